"""Two real engines: with room for all features at once, where a module has no `pair` of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.migration.engines import Engine
from tests.migration.features import ENGINE


@pytest.fixture(scope="module")
def pair(tiny_llama: Path) -> tuple[Engine, Engine]:
    return Engine(str(tiny_llama), **ENGINE), Engine(str(tiny_llama), **ENGINE)


@pytest.fixture
def engines(pair: tuple[Engine, Engine]) -> Iterator[tuple[Engine, Engine]]:
    """Both must be clean after each test: every block, request and runner entry came back."""
    yield pair
    for engine in pair:
        engine.run_out()
        assert engine.is_clean
