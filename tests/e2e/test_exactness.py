"""A request that moves is the same request: token for token, against itself and plain vLLM."""

import asyncio
import random
from functools import partial
from pathlib import Path

import pytest
from openai import AsyncOpenAI

from load_tests.servers import Server
from tests.e2e.conftest import all_up, start_fleet, write_config
from tests.e2e.fleet import Fleet, Stream, a_prompt

pytestmark = pytest.mark.e2e

AT_ONCE = 4
BLOCK = 32


def streams(greedy: int, seeded: int) -> list[Stream]:
    """Prompts of 10 to 2,000 tokens, the same ones at every call."""
    rng = random.Random(20261121)
    samplings = [{"temperature": 0}] * greedy + [
        {"temperature": 1.0, "seed": rng.randrange(1 << 30), "top_p": 0.95} for _ in range(seeded)
    ]
    return [
        Stream(
            prompt=a_prompt(rng, rng.choice([10, 40, 150, 400, 900, 2000])),
            max_tokens=rng.randint(200, 350),
            sampling=sampling,
        )
        for sampling in samplings
    ]


async def run_all(url: str, todo: list[Stream], move: Fleet | None = None) -> list[Stream]:
    """Run them, a few at once; with `move`, each migrates at a random point of its stream."""
    rng = random.Random(7)
    slots = asyncio.Semaphore(AT_ONCE)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as openai:

        async def one(number: int, stream: Stream) -> Stream:
            async with slots:
                if move is None:
                    return await stream.run(openai)
                for attempt in range(5):  # again if it ended before it could be moved
                    again = stream.again(f"moved-{number}-{attempt}")
                    at = rng.randint(1, 100)
                    moves: list[bool] = []
                    await again.run(openai, at, partial(moved, move, again.request_id, moves))
                    if any(moves):
                        break
                return again

        return await asyncio.gather(*(one(i, stream) for i, stream in enumerate(todo)))


async def moved(fleet_api: Fleet, request_id: str, moves: list[bool]) -> None:
    """Migrate, and note whether it did; a destination may be full or busy for a moment."""
    async with asyncio.timeout(20):
        while True:
            status, answer = await fleet_api.migrate(request_id)
            if status == 200 or "has ended" in answer["error"]["message"]:
                moves.append(status == 200)
                return
            await asyncio.sleep(0.01)


async def test_moved_streams_equal_unmoved_ones_and_plain_vllm(
    plain: Server, server: Server, running: Fleet
) -> None:
    expected = await run_all(plain.url, streams(greedy=30, seeded=10))
    unmoved = await run_all(server.url, streams(greedy=30, seeded=10))
    moved = await run_all(server.url, streams(greedy=30, seeded=10), running)

    assert [s.result() for s in unmoved] == [s.result() for s in expected]
    assert [s.result() for s in moved] == [s.result() for s in expected]
    for stream in moved:
        record = await running.request(stream.request_id)
        # Usually one; where memory got short, the scheduler moved it once more by itself.
        moves = [m for m in record["migrations"] if m["outcome"] == "completed"]
        assert moves
        assert record["replicas"] == [moves[0]["from"], *(m["to"] for m in moves)]
        assert record["output_tokens"] == len(stream.token_ids)
        assert all(m["bytes"] > 0 and m["recomputed_tokens"] <= BLOCK for m in moves)


async def test_without_the_kv_copy_they_differ(tmp_path: Path, plain: Server) -> None:
    """The control: the test above would notice lost bytes."""
    todo = [s for s in streams(greedy=30, seeded=0) if len(s.prompt) > 100][:8]
    expected = await run_all(plain.url, [Stream(s.prompt, s.max_tokens) for s in todo])
    config = write_config(tmp_path, "tests.e2e.no_copy:build_app")
    with start_fleet(config, tmp_path) as server:
        await all_up(server.url)
        async with Fleet(server.url) as api:
            moved = await run_all(server.url, todo, api)

    assert any(m.result() != e.result() for m, e in zip(moved, expected, strict=True))
