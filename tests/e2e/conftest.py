"""Real engines behind real Serve: fleets for the tests of this folder, started once each."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import yaml
from openai import AsyncOpenAI

from load_tests.servers import PROJECT, SMALL_ENGINE, Server, fleet, plain_vllm
from tests.e2e.fleet import Fleet

PRIORITIES = {
    "urgent": {"priority": -20, "api_keys": ["sk-urgent"]},
    "high": {"priority": -10, "headroom_tokens": 1600},
    "normal": {},
    "bounded": {"priority": 5, "max_queued_tokens": 50},
}


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Serve config of two small instances."""
    return write_config(tmp_path_factory.mktemp("fleet"), "app.main:build_app")


@pytest.fixture(scope="session")
def server(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The fleet that most tests talk to."""
    with start_fleet(config, tmp_path_factory.mktemp("log")) as running:
        asyncio.run(all_up(running.url))
        yield running


@pytest.fixture(scope="session")
def plain(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Plain vLLM with the same model and engine arguments."""
    with plain_vllm(config, log=tmp_path_factory.mktemp("log") / "vllm.log") as running:
        yield running


@pytest.fixture
async def running(server: Server) -> AsyncIterator[Fleet]:
    """The fleet's admin API. Each test leaves an empty fleet behind, or fails."""
    async with Fleet(server.url) as api:
        yield api
        await api.until_empty()


@pytest.fixture
async def openai(server: Server) -> AsyncIterator[AsyncOpenAI]:
    """OpenAI's own client."""
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def all_up(url: str) -> None:
    """Wait for both instances: the fleet serves as soon as one of them is up."""
    async with Fleet(url) as api:
        await api.until(lambda fleet: [r["state"] for r in fleet["replicas"]] == ["running"] * 2)


def write_config(folder: Path, import_path: str) -> Path:
    """A Serve YAML file of two instances of the tiny model."""
    model = {
        "model_id": "tiny-llama",
        "model_source": str(PROJECT / "models/tiny-llama"),
        "engine_kwargs": SMALL_ENGINE,
    }
    application = {"name": "llama", "route_prefix": "/", "import_path": import_path}
    args = {"model": model, "replicas": 2, "priorities": PRIORITIES}
    content = {"applications": [{**application, "args": args}]}
    file = folder / "fleet.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def start_fleet(config: Path, logs: Path) -> AbstractContextManager[Server]:
    """`make serve`, as a user would."""
    return fleet(config, overrides={}, make_variables={}, log=logs / "fleet.log")
