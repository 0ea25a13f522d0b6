"""Moves by hand and by themselves, and moves that cannot be."""

import asyncio
from collections import Counter

import aiohttp
import pytest
from openai import AsyncOpenAI
from openai.types import Completion
from prometheus_client.parser import text_string_to_metric_families

from load_tests.servers import Server
from tests.e2e.fleet import Fleet, Stream

pytestmark = pytest.mark.e2e


async def test_there_and_back_again(openai: AsyncOpenAI, running: Fleet) -> None:
    unmoved = await Stream("there and back", 300).run(openai)

    async def there_and_back() -> None:
        for _ in range(2):
            status, _ = await running.migrate("hobbit")
            assert status == 200

    moved = await Stream("there and back", 300, "hobbit").run(openai, 50, there_and_back)

    assert moved.result() == unmoved.result()
    replicas = (await running.request("hobbit"))["replicas"]
    assert len(replicas) == 3
    assert replicas[0] == replicas[2] != replicas[1]


async def test_a_client_that_leaves_after_a_move_frees_its_request(
    server: Server, running: Fleet
) -> None:
    body = {"model": "tiny-llama", "prompt": "x", "max_tokens": 4000, "stream": True}
    async with aiohttp.ClientSession(server.url) as session:
        response = await session.post(
            "/v1/completions", json=body, headers={"x-request-id": "moved-leaver"}
        )
        await response.content.readline()
        status, _ = await running.migrate("moved-leaver")
        assert status == 200
        response.close()

    await running.until_empty()


async def test_what_cannot_move_says_why_and_goes_on(openai: AsyncOpenAI, running: Fleet) -> None:
    answers: dict[str, tuple[int, str]] = {}

    async def try_all() -> None:
        here = (await running.request("stayer"))["replicas"][-1]
        for name, request_id, destination in (
            ("unknown request", "nobody", None),
            ("finished request", "early", None),
            ("unknown replica", "stayer", "nowhere"),
            ("same replica", "stayer", here),
        ):
            status, body = await running.migrate(request_id, destination)
            answers[name] = (status, body["error"]["message"])

    await Stream("early", 2, "early").run(openai)
    unmoved = await Stream("stay", 200).run(openai)
    stayed = await Stream("stay", 200, "stayer").run(openai, 20, try_all)

    assert answers == {
        "unknown request": (404, "no request 'nobody' is running or ended lately"),
        "finished request": (409, "request 'early' has ended (finished)"),
        "unknown replica": (404, "no replica 'nowhere'"),
        "same replica": (409, "the request is there already"),
    }
    assert stayed.result() == unmoved.result()


async def test_a_draining_replica_refuses_and_the_request_goes_on(
    openai: AsyncOpenAI, running: Fleet
) -> None:
    answers = []

    async def try_it() -> None:
        here = (await running.request("guest"))["replicas"][-1]
        (there,) = set(await running.replicas()) - {here}
        await running.post("/fleet/drain", {"replica_id": there})
        answers.append((there, *await running.migrate("guest", there)))
        await running.post("/fleet/undrain", {"replica_id": there})

    guest = await Stream("guest", 400, "guest").run(openai, 5, try_it)

    ((there, status, body),) = answers
    assert status == 409
    assert body["error"]["message"] == f"{there} refuses: it is draining"
    assert len(guest.token_ids) == 400
    assert there not in (await running.request("guest"))["replicas"]


async def test_forty_streams_on_one_replica_spread_by_themselves(
    openai: AsyncOpenAI, running: Fleet
) -> None:
    idle, _ = await running.replicas()
    streams = [Stream(f"{i} spread out " * 10, 600, f"spread-{i}") for i in range(40)]
    await running.post("/fleet/drain", {"replica_id": idle})
    tasks = [asyncio.create_task(stream.run(openai)) for stream in streams]
    await running.until(lambda f: any(r["running"] + r["waiting"] == 40 for r in f["replicas"]))
    await running.post("/fleet/undrain", {"replica_id": idle})
    await asyncio.gather(*tasks)

    ended = [await running.request(stream.request_id) for stream in streams]
    moved = [r for r in ended if len(set(r["replicas"])) == 2]
    assert len(moved) >= 5
    assert {r["state"] for r in ended} == {"finished"}
    for stream in streams[::8]:
        alone = await Stream(stream.prompt, stream.max_tokens).run(openai)
        assert stream.result() == alone.result()


async def test_a_drained_replica_empties_itself(openai: AsyncOpenAI, running: Fleet) -> None:
    # Long enough for a few overviews: beside eight streams one can take seconds on two cores.
    streams = [Stream(f"{i} drain", 2000, f"drained-{i}") for i in range(8)]
    tasks = [asyncio.create_task(stream.run(openai)) for stream in streams]
    overview = await running.until(lambda f: all(r["running"] >= 2 for r in f["replicas"]))
    drained = overview["replicas"][0]["replica_id"]

    await running.post("/fleet/drain", {"replica_id": drained})
    await running.until(
        lambda f: any(
            r["replica_id"] == drained and r["state"] == "draining" and r["running"] == 0
            for r in f["replicas"]
        )
    )
    still_running = sum(not task.done() for task in tasks)
    await asyncio.gather(*tasks)
    await running.post("/fleet/undrain", {"replica_id": drained})

    assert still_running > 0
    assert {(stream.finish_reason, len(stream.token_ids)) for stream in streams} == {
        ("length", 2000)
    }


async def test_the_children_of_n_move_one_by_one(openai: AsyncOpenAI, running: Fleet) -> None:
    async def ask(request_id: str) -> Completion:
        return await openai.completions.create(
            model="tiny-llama",
            prompt="three of a kind",
            max_tokens=300,
            n=3,
            seed=5,
            temperature=1,
            extra_headers={"x-request-id": request_id},
        )

    unmoved = await ask("still")
    moved = asyncio.create_task(ask("triplets"))
    for child in ("triplets", "triplets.2"):
        await until_migrated(running, child)
    answer = await moved

    assert [c.text for c in answer.choices] == [c.text for c in unmoved.choices]
    assert answer.usage == unmoved.usage
    records = [await running.request(f"triplets{child}") for child in ("", ".1", ".2")]
    assert [len(record["migrations"]) for record in records] == [1, 0, 1]


async def until_migrated(running: Fleet, request_id: str) -> None:
    """Its first tokens may not be there yet, or another move be under way."""
    async with asyncio.timeout(30):
        while (await running.migrate(request_id))[0] != 200:
            await asyncio.sleep(0.01)


COUNTED = {
    "vllm:prompt_tokens_total": 20,
    "vllm:generation_tokens_total": 200,
    "vllm:time_to_first_token_seconds_count": 1,
    "vllm:e2e_request_latency_seconds_count": 1,
    "vllm:request_success_total": 1,
    "vllm:request_time_per_output_token_seconds_count": 1,
}


async def test_a_moved_request_is_counted_once_in_the_metrics(
    server: Server, openai: AsyncOpenAI, running: Fleet
) -> None:
    before = await counters(server)
    counted = Stream("just counting you know".ljust(20, "!")[:20], 200, "counted")
    await counted.run(openai, 20, lambda: until_migrated(running, "counted"))
    after = await counters(server)

    assert len((await running.request("counted"))["migrations"]) == 1
    assert {name: after[name] - before[name] for name in COUNTED} == COUNTED


async def counters(server: Server) -> Counter[str]:
    """vLLM's metrics, summed over their labels."""
    async with aiohttp.ClientSession(server.url) as session, session.get("/metrics") as response:
        text = await response.text()
    sums: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in COUNTED:
                sums[sample.name] += int(sample.value)
    return sums
