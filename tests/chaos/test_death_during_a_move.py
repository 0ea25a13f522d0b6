"""An instance that hangs or dies in the middle of a move: the request's stream is what it was."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from openai import AsyncOpenAI

from deployments.emulated.profile import load_profile
from load_tests.chaos.processes import Processes
from load_tests.servers import Server, fleet
from tests.e2e.conftest import all_up, write_config
from tests.e2e.fleet import Fleet, Stream

pytestmark = pytest.mark.e2e

PROMPT = "the quick brown fox jumps over the lazy dog again and " * 60
"""3,240 tokens, so that stage 0 takes 2.7 s."""

OUTPUT_TOKENS = 240
"""29 ms each: they outlast a move that is given up."""

TIMEOUT_S = 4.0


@asynccontextmanager
async def slow_link(folder: Path) -> AsyncIterator[tuple[Server, Fleet, AsyncOpenAI]]:
    """Two emulated A10 GPUs whose link is four times as slow as in the paper: time enough for
    somebody to die in a copy. A move is given up after a few seconds of silence.
    """
    a10 = load_profile("a10-llama-7b")
    slow = msgspec.structs.replace(a10, copy_token_s=4 * a10.copy_token_s)
    profile = folder / "slow-link.json"
    profile.write_bytes(msgspec.json.encode(slow))
    args = {
        "model": {
            "model_id": "tiny-llama",
            "model_source": "models/tiny-llama",
            # What the destination has cached would not be sent: no stage 0 to die in.
            "engine_kwargs": {"enable_prefix_caching": False},
        },
        "engine": {"emulated": {"profile": str(profile)}},
        "migration": {"enabled": False, "timeout_s": TIMEOUT_S},
    }
    config = write_config(folder, "app.main:build_app")
    with fleet(config, args, {}, folder / "fleet.log") as server:
        await all_up(server.url)
        url = f"{server.url}/v1"
        async with (
            Fleet(server.url) as api,
            AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as openai,
        ):
            yield server, api, openai


async def moving(api: Fleet, request_id: str) -> tuple[asyncio.Task[Any], str, str]:
    """Begin a move and wait until its stage 0 is on its way: the call, source, destination."""
    source = (await api.request(request_id))["replicas"][-1]
    (destination,) = set(await api.replicas()) - {source}
    call = asyncio.create_task(api.migrate(request_id, destination))
    await api.until(lambda overview: any(r["migrating_out"] for r in overview["replicas"]))
    return call, source, destination


async def test_a_destination_that_hangs_or_dies_does_not_touch_the_stream(tmp_path: Path) -> None:
    async with slow_link(tmp_path) as (server, api, openai):
        expected = (await Stream(PROMPT, OUTPUT_TOKENS).run(openai)).result()
        processes = Processes(server.pid).instances()  # before there is a hurry
        answers = []

        async def hang() -> None:
            call, _, destination = await moving(api, "patient")
            processes[destination].send_signal(signal.SIGSTOP)
            answers.append(await call)
            processes[destination].send_signal(signal.SIGCONT)

        async def die() -> None:
            call, _, destination = await moving(api, "survivor")
            processes[destination].kill()
            answers.append(await call)

        patient = await Stream(PROMPT, OUTPUT_TOKENS, "patient").run(openai, 5, hang)
        await api.until_empty()
        survivor = await Stream(PROMPT, OUTPUT_TOKENS, "survivor").run(openai, 5, die)
        await api.until_empty()

        assert [status for status, _ in answers] == [409, 409], answers
        assert patient.result() == expected
        assert survivor.result() == expected
        for request_id in ("patient", "survivor"):
            record = await api.request(request_id)
            assert [move["outcome"] for move in record["migrations"]] == ["aborted"]
            assert len(record["replicas"]) == 1


async def test_a_source_that_dies_leaves_its_request_to_go_on_and_no_block(tmp_path: Path) -> None:
    async with slow_link(tmp_path) as (server, api, openai):
        expected = (await Stream(PROMPT, OUTPUT_TOKENS).run(openai)).result()
        processes = Processes(server.pid).instances()  # before there is a hurry
        destinations = []

        async def die() -> None:
            call, source, destination = await moving(api, "victim")
            destinations.append(destination)
            processes[source].kill()
            await call

        victim = await Stream(PROMPT, OUTPUT_TOKENS, "victim").run(openai, 5, die)

        def given_back(overview: dict[str, Any]) -> bool:
            return any(
                each["replica_id"] == destinations[0]
                and not (each["blocks_used"] or each["migrating_in"])
                for each in overview["replicas"]
            )

        await api.until(given_back)
        assert victim.result() == expected
        record = await api.request("victim")
        assert record["recoveries"] == 1
        assert record["replicas"][1:] == destinations  # there was no other
        await api.until_empty()
