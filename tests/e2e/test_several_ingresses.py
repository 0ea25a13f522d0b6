"""Two ingresses: each tells of all requests, and moves them, whichever of them has the stream."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import suppress

import aiohttp
import psutil
import pytest
from openai import AsyncOpenAI

from load_tests.cpu import title
from load_tests.drain import ARGS
from load_tests.servers import Server, application, serving
from tests.e2e.fleet import DEADLINE_S, Fleet, Stream

pytestmark = pytest.mark.e2e

ANSWER_S = 2.0
"""How long an ingress waits for the other, if that hangs."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    content = application({**ARGS, "replicas": 2})
    content["applications"][0]["deployments"] = [{"name": "Ingress", "num_replicas": 2}]
    with serving(content, {}, tmp_path_factory.mktemp("log") / "fleet.log") as running:
        asyncio.run(both_answer(running))
        yield running


@pytest.fixture
async def openai(server: Server) -> AsyncIterator[AsyncOpenAI]:
    url = f"{server.url}/v1"
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


async def both_answer(server: Server) -> None:
    """Tells one ingress from the other by when it started, as its own metrics have it."""
    started: set[str] = set()
    async with asyncio.timeout(DEADLINE_S):
        while len(started) < 2:
            async with aiohttp.request("GET", f"{server.url}/metrics") as response:
                lines = (await response.text()).splitlines()
            started |= {line for line in lines if line.startswith("process_start_time_seconds")}
            await asyncio.sleep(0.1)


async def shown(server: Server) -> set[str]:
    """The running requests; over a new connection, so by the one ingress or the other."""
    async with Fleet(server.url) as fleet:
        _, requests = await fleet.get("/fleet/requests")
    running = [one["request_id"] for one in requests if one["state"] == "running"]
    assert len(set(running)) == len(running), "one was told of twice"
    return set(running)


async def start(
    server: Server, openai: AsyncOpenAI, streams: Sequence[Stream]
) -> list[asyncio.Task[Stream]]:
    """The streams, all of them running."""
    tasks = [asyncio.create_task(stream.run(openai)) for stream in streams]
    async with asyncio.timeout(DEADLINE_S):
        while len(await shown(server)) < len(streams):
            await asyncio.sleep(0.05)
    return tasks


def streams(prefix: str, tokens: int) -> list[Stream]:
    """Eight, of about 18 ms a token."""
    return [
        Stream(f"Tell me of {what}", tokens, f"{prefix}-{what}", model=ARGS["model"]["model_id"])
        for what in "abcdefgh"
    ]


async def test_each_ingress_shows_and_moves_the_requests_of_both(
    server: Server, openai: AsyncOpenAI
) -> None:
    unmoved = await asyncio.gather(*(one.run(openai) for one in streams("stays", 150)))
    moved = streams("moves", 150)

    tasks = await start(server, openai, moved)
    told = [await shown(server) for _ in range(6)]
    moves = []
    for stream in moved:
        async with Fleet(server.url) as fleet:
            assert (await fleet.request(stream.request_id))["request_id"] == stream.request_id
            moves.append(await fleet.migrate(stream.request_id))

    await asyncio.gather(*tasks)
    assert [one.result() for one in moved] == [one.result() for one in unmoved]
    assert told == [{one.request_id for one in moved}] * 6
    assert [(status, move["outcome"]) for status, move in moves] == [(200, "completed")] * 8
    async with Fleet(server.url) as fleet:
        assert (await fleet.get("/fleet/requests/nobody"))[0] == 404
        assert (await fleet.overview())["recoveries"] == 0


async def test_an_ingress_that_hangs_or_dies_takes_its_own_requests_only(
    server: Server, openai: AsyncOpenAI
) -> None:
    begun = streams("kept", 400)
    tasks = await start(server, openai, begun)
    ingress, _ = (
        process
        for process in psutil.Process(server.pid).children(recursive=True)
        if "Ingress" in title(process)
    )

    ingress.suspend()
    asks = [asyncio.create_task(timed(shown(server))) for _ in range(4)]
    (first, *_), _ = await asyncio.wait(asks, return_when=asyncio.FIRST_COMPLETED)
    ingress.resume()
    others, waited = first.result()
    await asyncio.gather(*asks)
    everybodys = await shown(server)
    ingress.kill()
    left = [await after_the_death(server) for _ in range(3)]
    ended = await asyncio.gather(*tasks, return_exceptions=True)

    assert set() < others < everybodys == {stream.request_id for stream in begun}
    assert ANSWER_S <= waited < 2 * ANSWER_S
    assert left == [others] * 3
    kept = [stream for stream in begun if stream in ended]
    assert {stream.request_id for stream in kept} == others
    assert all(len(stream.token_ids) == stream.max_tokens for stream in kept)
    async with Fleet(server.url) as fleet:
        await fleet.until_empty()


async def timed(asking: Awaitable[set[str]]) -> tuple[set[str], float]:
    """The answer, and the seconds that it took."""
    started = time.monotonic()
    return await asking, time.monotonic() - started


async def after_the_death(server: Server) -> set[str]:
    """Like `shown`; HAProxy may still send us to the one that is dead."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            with suppress(aiohttp.ClientError):
                return await shown(server)
            await asyncio.sleep(0.05)
