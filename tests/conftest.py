"""Fixtures that several packages' tests share."""

from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's folder: the project's own where it is built, else a new one."""
    from app import tiny_model

    folder = PROJECT / "models" / "tiny-llama"
    if not (folder / "config.json").is_file():
        folder = tmp_path_factory.mktemp("models") / "tiny-llama"
        tiny_model.build(folder)
    return folder
