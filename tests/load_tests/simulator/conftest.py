"""Small emulated instances for the simulator's tests."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from deployments.emulated.profile import load_profile


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An A10 with little memory: three long requests are too many."""
    a10 = load_profile("a10-llama-7b")
    small = msgspec.structs.replace(a10, blocks=64, max_batch=16, max_step_tokens=512)
    file = tmp_path_factory.mktemp("profiles") / "small.json"
    file.write_bytes(msgspec.json.encode(small))
    return str(file)


@pytest.fixture(scope="module")
def args(tiny_llama: Path, profile: str) -> dict[str, Any]:
    return {
        "model": {
            "model_id": "emulated",
            "model_source": str(tiny_llama),
            "engine_kwargs": {"enable_prefix_caching": False},
        },
        "engine": {"emulated": {"profile": profile}},
        "dispatch": "round_robin",
    }
