"""vLLM's own server, whole, over the fleet; and what it answers to bad input."""

import asyncio
from typing import Any

import aiohttp
import openai as errors
import pytest
from openai import AsyncOpenAI

from load_tests.servers import Server
from tests.e2e.fleet import Fleet, Stream

pytestmark = pytest.mark.e2e

HI = [{"role": "user", "content": "hi there"}]


async def test_chat_answers_at_once_and_streamed_alike(openai: AsyncOpenAI) -> None:
    whole = await openai.chat.completions.create(
        model="tiny-llama", messages=HI, max_tokens=20, temperature=0
    )
    chunks = await openai.chat.completions.create(
        model="tiny-llama",
        messages=HI,
        max_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    received = [chunk async for chunk in chunks]

    streamed = "".join(c.choices[0].delta.content or "" for c in received if c.choices)
    assert streamed == whole.choices[0].message.content
    assert received[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 20


async def test_n_sequences_with_logprobs(openai: AsyncOpenAI) -> None:
    answer = await openai.completions.create(
        model="tiny-llama", prompt="abc", max_tokens=8, n=3, logprobs=2, seed=1, temperature=1
    )

    assert len({choice.text for choice in answer.choices}) == 3
    assert [len(choice.logprobs.tokens) for choice in answer.choices] == [8, 8, 8]


async def test_a_stop_string_ends_the_text_and_frees_the_request(
    openai: AsyncOpenAI, running: Fleet
) -> None:
    full = await Stream("stop here", 60).run(openai)
    stop = full.text[20:23]

    answer = await openai.completions.create(
        model="tiny-llama",
        prompt="stop here",
        max_tokens=60,
        temperature=0,
        stop=[stop],
        extra_headers={"x-request-id": "stopped"},
    )

    assert answer.choices[0].text == full.text[: full.text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert (await running.request("stopped"))["state"] == "finished"


async def test_structured_output(openai: AsyncOpenAI) -> None:
    answer = await openai.completions.create(
        model="tiny-llama",
        prompt="pick",
        max_tokens=20,
        temperature=0,
        extra_body={"structured_outputs": {"choice": ["yes please", "no thanks"]}},
    )

    assert answer.choices[0].text in ("yes please", "no thanks")


async def test_models_tokenize_health_and_metrics(server: Server, openai: AsyncOpenAI) -> None:
    assert [model.id async for model in openai.models.list()] == ["tiny-llama"]
    async with aiohttp.ClientSession(server.url) as session:
        async with session.post("/tokenize", json={"model": "tiny-llama", "prompt": "abc"}) as r:
            assert (await r.json())["count"] == 3
        async with session.get("/health") as r:
            assert r.status == 200
        async with session.get("/metrics") as r:
            assert "vllm:generation_tokens_total" in await r.text()


async def test_unknown_model_is_404(openai: AsyncOpenAI) -> None:
    with pytest.raises(errors.NotFoundError, match="does not exist"):
        await openai.completions.create(model="gpt-9", prompt="x")


async def test_over_long_prompt_and_invalid_parameters_are_400(openai: AsyncOpenAI) -> None:
    with pytest.raises(errors.BadRequestError, match="4096"):
        await openai.completions.create(model="tiny-llama", prompt="x" * 5000, max_tokens=1)
    with pytest.raises(errors.BadRequestError, match="temperature"):
        await openai.completions.create(model="tiny-llama", prompt="x", temperature=-1)


async def test_malformed_json_and_unknown_priority_are_400_in_openai_form(server: Server) -> None:
    async with aiohttp.ClientSession(server.url) as session:
        json_header = {"content-type": "application/json"}
        async with session.post("/v1/completions", data="{oops", headers=json_header) as r:
            assert r.status == 400
            assert (await r.json())["error"]["message"]
        headers = {"x-llumnix-priority": "emperor"}
        async with session.post("/v1/completions", json={}, headers=headers) as r:
            assert r.status == 400
            known = "known classes: bounded, high, normal, urgent"
            assert known in (await r.json())["error"]["message"]


async def test_priority_by_header_and_by_body_field(openai: AsyncOpenAI, running: Fleet) -> None:
    for name, extra in (
        (
            "by-header",
            {"extra_headers": {"x-llumnix-priority": "high", "x-request-id": "by-header"}},
        ),
        (
            "by-body",
            {"extra_headers": {"x-request-id": "by-body"}, "extra_body": {"priority": -10}},
        ),
    ):
        await openai.completions.create(model="tiny-llama", prompt="x", max_tokens=2, **extra)
        assert (await running.request(name))["priority"] == "high"


@pytest.mark.parametrize(
    ("key", "asks", "gets"),
    [
        ("sk-urgent", {}, "urgent"),
        ("sk-urgent", {"extra_body": {"priority": -99}}, "urgent"),
        ("sk-urgent", {"extra_headers": {"x-llumnix-priority": "normal"}}, "normal"),
        ("none", {}, "normal"),
        ("none", {"extra_body": {"priority": -99}}, "high"),
        ("none", {"extra_headers": {"x-llumnix-priority": "urgent"}}, "high"),
    ],
)
async def test_a_key_opens_its_class_and_is_needed_for_it(
    openai: AsyncOpenAI, running: Fleet, key: str, asks: dict[str, Any], gets: str
) -> None:
    caller = openai.with_options(api_key=key)
    answer = await caller.completions.create(model="tiny-llama", prompt="x", max_tokens=2, **asks)

    shown = {
        one["request_id"]: one["priority"] for one in (await running.get("/fleet/requests"))[1]
    }
    assert shown[answer.id] == gets


async def test_a_client_that_leaves_frees_its_request(server: Server, running: Fleet) -> None:
    body = {"model": "tiny-llama", "prompt": "x", "max_tokens": 4000, "stream": True}
    async with aiohttp.ClientSession(server.url) as session:
        response = await session.post(
            "/v1/completions", json=body, headers={"x-request-id": "leaver"}
        )
        await response.content.readline()
        response.close()

    async with asyncio.timeout(10):
        while (await running.request("leaver"))["state"] != "aborted":
            await asyncio.sleep(0.05)
    await running.until_empty()


async def test_a_response_id_names_the_request_too(openai: AsyncOpenAI, running: Fleet) -> None:
    answer = await openai.completions.create(model="tiny-llama", prompt="x", max_tokens=2)

    assert (await running.request(answer.id))["request_id"] == answer.id
