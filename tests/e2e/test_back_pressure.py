"""Too much, or nobody to take it: what OpenAI's own client is told through HTTP."""

import asyncio
from typing import Any

import openai as errors
import pytest
from openai import AsyncOpenAI

from tests.e2e.fleet import Fleet

pytestmark = pytest.mark.e2e

BOUNDED = {"extra_headers": {"x-llumnix-priority": "bounded"}}
CROWD = 150
"""More sequences than both instances run at once; let in as a whole, because the queue is empty."""


async def ask(openai: AsyncOpenAI, **more: Any) -> Any:
    return await openai.completions.create(
        model="tiny-llama", prompt="hello there", temperature=1, **more
    )


async def test_a_full_queue_is_a_429_with_the_time_to_come_back(
    openai: AsyncOpenAI, running: Fleet
) -> None:
    crowd = asyncio.create_task(ask(openai, n=CROWD, max_tokens=200, **BOUNDED))
    await running.until(lambda fleet: any(r["waiting"] for r in fleet["replicas"]))

    for stream in (False, True):
        with pytest.raises(errors.RateLimitError, match="queue of class 'bounded' is full") as full:
            await ask(openai, stream=stream, max_tokens=1, **BOUNDED)
        assert 1 <= int(full.value.response.headers["retry-after"]) <= 60
        assert full.value.body["type"] == "RateLimitError"
    others = await ask(openai, max_tokens=1)

    assert others.choices[0].finish_reason == "length"
    assert len((await crowd).choices) == CROWD
    _, shown = await running.get("/fleet/requests")
    assert sum(one["priority"] == "bounded" for one in shown) == CROWD
    assert (await ask(openai, max_tokens=1, **BOUNDED)).choices[0].finish_reason == "length"


async def test_while_all_instances_drain_a_request_is_a_503(
    openai: AsyncOpenAI, running: Fleet
) -> None:
    replicas = await running.replicas()
    for replica_id in replicas:
        await running.post("/fleet/drain", {"replica_id": replica_id})
    await running.until(lambda f: all(r["state"] == "draining" for r in f["replicas"]))

    refused = []
    for stream in (False, True):
        with pytest.raises(errors.InternalServerError) as error:
            await ask(openai, stream=stream, max_tokens=1)
        refused.append(error.value)
    for replica_id in replicas:
        await running.post("/fleet/undrain", {"replica_id": replica_id})
    await running.until(lambda f: all(r["state"] == "running" for r in f["replicas"]))

    assert [error.status_code for error in refused] == [503, 503]
    assert all("all are draining" in error.message for error in refused)
    assert (await ask(openai, max_tokens=1)).choices[0].finish_reason == "length"
