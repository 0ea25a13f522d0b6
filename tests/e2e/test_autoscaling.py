"""A fleet of emulated engines that Serve scales: it grows under load and shrinks, unnoticed."""

import asyncio
from collections.abc import Iterator

import msgspec
import pytest
import yaml
from openai import AsyncOpenAI

from deployments.emulated.profile import load_profile
from load_tests.servers import PROJECT, Server
from tests.e2e.conftest import start_fleet
from tests.e2e.fleet import Fleet, Stream

pytestmark = pytest.mark.e2e

STREAM = Stream("Whatever it is that is asked here", 200, model="emulated")
"""About 16 KV blocks, four seconds."""


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One instance, which has memory for eight streams; three, if need be."""
    folder = tmp_path_factory.mktemp("scaled")
    small = msgspec.structs.replace(load_profile("a10-llama-7b"), blocks=128)
    (folder / "small.json").write_bytes(msgspec.json.encode(small))
    args = {
        "model": {"model_id": "emulated", "model_source": str(PROJECT / "models/tiny-llama")},
        "engine": {"emulated": {"profile": str(folder / "small.json")}},
        "autoscaling": {"max": 3, "freeness_low": 1, "freeness_high": 8, "period_s": 2},
    }
    application = {"name": "llama", "route_prefix": "/", "import_path": "app.main:build_app"}
    config = folder / "fleet.yaml"
    config.write_text(yaml.safe_dump({"applications": [{**application, "args": args}]}))
    with start_fleet(config, folder) as server:
        yield server


async def load(openai: AsyncOpenAI, streams: int, until: asyncio.Task) -> list[Stream]:
    """So many at a time, one after the other; those that ended."""
    ended: list[Stream] = []

    async def go_on() -> None:
        while not until.done():
            ended.append(await STREAM.again("").run(openai))

    await asyncio.gather(*(go_on() for _ in range(streams)))
    await until
    return ended


async def test_instances_come_under_load_and_go_after_it_and_no_stream_notices(scaled: Server):
    def is_all(number: int) -> asyncio.Task:
        wanted = ["running"] * number
        return asyncio.create_task(
            fleet.until(lambda view: [one["state"] for one in view["replicas"]] == wanted)
        )

    url = f"{scaled.url}/v1"
    async with (
        Fleet(scaled.url) as fleet,
        AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as openai,
    ):
        await is_all(1)
        alone = await STREAM.again("").run(openai)
        streams = await load(openai, 40, until=is_all(3))
        streams += await load(openai, 3, until=is_all(1))
    assert alone.finish_reason == "length"
    assert len(alone.token_ids) == 200
    assert [one for one in streams if one.result() != alone.result()] == []
