"""vLLM's own server over replicas that do what the test says: who is refused, and how."""

import asyncio
import json
import pickle
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.middleware import Middleware
from vllm.engine.protocol import StreamingInput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from app import front_end, refusals
from app import openai_app as openai_app_module
from app.config import FleetConfig, load
from app.peers import Peers
from app.refusals import Answer
from deployments import engine_config
from deployments.consult import NoInstance
from deployments.messages import Hello
from tests.app.fakes import FakeIngresses, FakeReplicas
from tests.app.ingress import a_request

ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 4 << 20,
    "max_model_len": 512,
}
COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"

FULL = "the queue of class 'normal' is full: 8 prompt tokens wait; try again in 1 s"


@dataclass
class World:
    """A front end whose class `normal` has room for ten prompt tokens; a byte is one."""

    llm: AsyncLLM
    http: httpx.AsyncClient
    replicas: FakeReplicas
    posts: list[asyncio.Task[httpx.Response]] = field(default_factory=list)

    async def post(
        self, path: str = COMPLETIONS, headers: dict[str, str] | None = None, **body: Any
    ) -> httpx.Response:
        body = {"model": "tiny", "max_tokens": 3, **body}
        async with asyncio.timeout(20):
            return await self.http.post(path, json=body, headers=headers)

    async def begun(self, *, owned: bool = True, **body: Any) -> list[str]:
        """Post a request that goes on by itself; the ids of what it asks of the engines."""
        known = len(self.replicas.submitted)
        self.posts.append(asyncio.create_task(self.post(**body)))
        ids = (await self.replicas.until_submitted(known + body.get("n", 1)))[known:]
        for request_id in ids if owned else ():
            self.replicas.own(request_id)
        return ids

    def forgotten(self) -> bool:
        """Whether vLLM's front end has let go of all requests."""
        processor = self.llm.output_processor
        return not (
            processor.request_states or processor.parent_requests or processor.external_req_ids
        )


def config_of(tiny_llama: Path, **engine_kwargs: str) -> FleetConfig:
    arguments = {**ENGINE, **engine_kwargs}
    model = {"model_id": "tiny", "model_source": str(tiny_llama), "engine_kwargs": arguments}
    priorities = {"normal": {"max_queued_tokens": 10}, "high": {"priority": -10}}
    recovery = {"max_recoveries": 0}
    return load({"model": model, "priorities": priorities, "recovery": recovery})


def hello_of(config: FleetConfig) -> Hello:
    vllm_config = engine_config.build(config.model, config.engine)
    return Hello(pickle.dumps(vllm_config), 512, 100, ("generate",), "fingerprint")


@pytest.fixture(scope="module")
def config(tiny_llama: Path) -> FleetConfig:
    return config_of(tiny_llama)


@pytest.fixture(scope="module")
def hello(config: FleetConfig) -> Hello:
    return hello_of(config)


@pytest.fixture
async def world(
    config: FleetConfig, hello: Hello, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    async with a_world(config, hello, monkeypatch) as world:
        yield world


@asynccontextmanager
async def a_world(
    config: FleetConfig, hello: Hello, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    replicas = FakeReplicas()
    monkeypatch.setattr(front_end, "Inbox", lambda host: replicas.inbox)
    peers = Peers(FakeIngresses(), "me")
    app, llm, _ = await front_end.build(config, hello, replicas.handle, replicas.handle, peers)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://fleet"
    ) as http:
        yield World(llm, http, replicas)
    llm.shutdown()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "abc"}),
        (COMPLETIONS, {"prompt": "abc", "n": 3, "temperature": 1}),
        (COMPLETIONS, {"prompt": ["abc", "def"]}),
        (CHAT, {"messages": [{"role": "user", "content": "hi"}]}),
        (RESPONSES, {"input": "hi"}),
    ],
)
async def test_a_full_queue_is_a_429_on_every_route(world: World, path, body, stream):
    await world.begun(prompt="12345678")

    response = await world.post(path, stream=stream, **body)

    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    assert response.headers["content-type"] == "application/json"
    assert response.json()["error"]["message"] == FULL
    assert len(world.replicas.submitted) == 1
    assert len(world.llm.output_processor.request_states) == 1


async def test_the_first_token_makes_room(world: World):
    (first,) = await world.begun(prompt="12345678")
    assert (await world.post(prompt="abc")).status_code == 429

    world.replicas.send(first, 0, [65])
    (second,) = await world.begun(prompt="abc")

    world.replicas.send(first, 1, [66, 67], last=True)
    world.replicas.send(second, 0, [68], last=True)
    answers = await asyncio.gather(*world.posts)
    assert [answer.json()["choices"][0]["text"] for answer in answers] == ["ABC", "D"]


async def test_a_client_that_leaves_makes_room(world: World):
    await world.begun(prompt="12345678", stream=True)
    world.posts[0].cancel()
    await asyncio.gather(*world.posts, return_exceptions=True)

    await world.begun(prompt="abc")


async def test_other_classes_have_room(world: World):
    await world.begun(prompt="12345678")
    assert (await world.post(prompt="abc")).status_code == 429
    await world.begun(prompt="12345678", priority=-10)


async def test_what_one_http_request_asks_for_is_let_in_as_a_whole(world: World):
    ids = await world.begun(prompt="12345678", n=3, temperature=1)
    for request_id in ids:
        world.replicas.send(request_id, 0, [65], last=True)
    (answer,) = await asyncio.gather(*world.posts)
    assert [choice["text"] for choice in answer.json()["choices"]] == ["A"] * 3


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_is_lost_before_its_first_token_is_a_503(world: World, stream):
    one, other = await world.begun(prompt="abc", n=2, temperature=1, stream=stream)

    world.replicas.fail(one, ConnectionError("reset by peer"))

    (response,) = await asyncio.gather(*world.posts)
    assert response.status_code == 503
    assert response.json()["error"]["message"] == (
        "the request failed: its instance a failed on it (ConnectionError); try again"
    )
    assert other in world.replicas.cancelled
    assert world.forgotten()


async def test_a_stream_that_is_lost_later_ends_with_the_reason(world: World):
    (request_id,) = await world.begun(prompt="abc", stream=True)
    world.replicas.send(request_id, 0, [65])
    stats = world.llm.output_processor.request_states[request_id]
    async with asyncio.timeout(5):
        while stats.is_prefilling:
            await asyncio.sleep(0)

    world.replicas.fail(request_id, ConnectionError("reset by peer"))

    (response,) = await asyncio.gather(*world.posts)
    assert response.status_code == 200
    assert '"text":"A"' in response.text
    *_, error, done = response.text.strip().split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"] == {
        "message": "the request failed: its instance a failed on it (ConnectionError); try again",
        "type": "ServiceUnavailableError",
        "param": None,
        "code": 503,
    }
    assert done == "data: [DONE]"
    assert world.forgotten()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_fleet_that_drains_is_a_503(world: World, stream):
    (request_id,) = await world.begun(owned=False, prompt="abc", stream=stream)

    world.replicas.fail(request_id, NoInstance("all are draining"))

    (response,) = await asyncio.gather(*world.posts)
    assert response.status_code == 503
    assert response.json()["error"]["message"] == (
        "no instance takes the request: all are draining; try again later"
    )


async def test_refusals_do_not_count_in_vllms_latencies(world: World):
    (first,) = await world.begun(prompt="12345678")
    for _ in range(3):
        assert (await world.post(prompt="abc")).status_code == 429
    world.replicas.send(first, 0, [65], last=True)
    await asyncio.gather(*world.posts)

    metrics = (await world.http.get("/metrics")).text
    (line,) = (
        line for line in metrics.splitlines() if "time_to_first_token_seconds_count{" in line
    )
    assert line.endswith(" 1.0")


@pytest.mark.parametrize("n", [1, 2])
async def test_a_number_that_no_message_can_hold_is_the_clients_mistake(world: World, n):
    headers = {"X-Vllm-Priority": str(10**30)}

    response = await world.post(prompt="abc", n=n, temperature=1, headers=headers)

    assert response.status_code == 400
    assert "cannot be sent to an engine" in response.json()["error"]["message"]
    assert world.replicas.submitted == {}
    assert world.forgotten()


async def test_an_error_of_ours_is_a_500_in_openais_form(world: World, monkeypatch):
    async def fail(request: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(world.llm.engine_core, "add_request_async", fail)
    response = await world.post(prompt="abc")
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "InternalServerError"


async def test_what_would_free_memory_of_a_kv_connector_is_no_request(world: World):
    await world.llm.notify_kv_transfer_request_rejected("r1", {"do_remote_prefill": True})
    assert world.llm.engine_core.journal.live() == []


async def test_input_that_streams_in_is_refused(world: World):
    async def pieces() -> AsyncIterator[StreamingInput]:
        yield StreamingInput({"prompt_token_ids": [1, 2, 3]})

    parameters = SamplingParams(output_kind=RequestOutputKind.DELTA)
    with pytest.raises(ValueError, match="not supported by a fleet"):
        async for _ in world.llm.generate(pieces(), parameters, "r1"):
            pass
    assert world.replicas.submitted == {}
    assert world.forgotten()


async def test_reasoning_is_told_apart_as_the_yaml_says(tiny_llama: Path, monkeypatch):
    config = config_of(tiny_llama, reasoning_parser="granite")
    async with a_world(config, hello_of(config), monkeypatch) as world:
        (request_id,) = await world.begun(
            path=CHAT, messages=[{"role": "user", "content": "a"}], max_tokens=99
        )
        said = "Here is my thought process: hm. Here is my response: yes."
        world.replicas.send(request_id, 0, list(said.encode()), last=True)
        (response,) = await asyncio.gather(*world.posts)
    message = response.json()["choices"][0]["message"]
    assert (message["reasoning"].strip(), message["content"].strip()) == ("hm.", "yes.")


async def test_a_parser_that_is_not_known_is_named_at_the_start(tiny_llama: Path, monkeypatch):
    config = config_of(tiny_llama, enable_auto_tool_choice=True, tool_call_parser="hermse")
    with pytest.raises(KeyError, match="invalid tool call parser: hermse"):
        async with a_world(config, hello_of(config), monkeypatch):
            pass


async def test_vllms_own_middleware_sees_what_the_client_gets(config, hello, monkeypatch):
    """Its HTTP metrics among them, in which a refusal must not be a success."""
    statuses = []

    class Spy:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            async def spied(message):
                statuses.append(message.get("status"))
                await send(message)

            await self.app(scope, receive, spied)

    async def spied_app(*args):
        app = await openai_app_module.openai_app(*args)
        app.user_middleware.insert(0, Middleware(Spy))
        return app

    monkeypatch.setattr(front_end, "openai_app", spied_app)
    async with a_world(config, hello, monkeypatch) as world:
        await world.begun(prompt="12345678")
        assert (await world.post(prompt="abc")).status_code == 429
    assert statuses == [429, None]


async def test_what_vllm_asks_in_the_name_of_a_request_is_of_its_class(world: World):
    """Later turns of an answer with built-in tools come with a priority of vLLM's own."""
    answer = Answer()
    token = refusals.current.set(answer)
    client = world.llm.engine_core
    for name, priority in (("turn-1", -10), ("turn-2", -11)):
        await client.add_request_async(a_request(name, prompt_tokens=2, priority=priority))
    refusals.current.reset(token)
    ids = await world.replicas.until_submitted(2)
    classes = [world.replicas.submitted[request_id].priority_class for request_id in ids]
    assert classes == ["high", "high"]
    assert answer.placed == ("high", -10)


@pytest.mark.parametrize(("configured", "opens"), [(None, "sk-all"), ("sk-admin", "sk-admin")])
async def test_the_admin_api_asks_for_a_key_where_vllm_does(
    config: FleetConfig, hello: Hello, monkeypatch, configured, opens
):
    monkeypatch.setenv("VLLM_API_KEY", "sk-all")
    admin = config.admin.model_copy(update={"api_key": configured})
    guarded = config.model_copy(update={"admin": admin})
    async with a_world(guarded, hello, monkeypatch) as world:
        answers = [
            (await world.http.get("/fleet/requests", headers=headers)).status_code
            for headers in ({}, {"Authorization": f"Bearer {opens}"})
        ]
    assert answers == [401, 200]


async def test_a_front_end_needs_no_gpu(config: FleetConfig, hello: Hello, monkeypatch):
    """Its host may have none, where vLLM's CUDA build knows of no device."""
    kind = type(current_platform)
    parser = openai_app_module.make_arg_parser

    def without_device(*args):
        assert kind.device_type, "vLLM would fail to infer it"
        return parser(*args)

    monkeypatch.setattr(openai_app_module, "make_arg_parser", without_device)
    monkeypatch.setattr(kind, "device_type", "")
    async with a_world(config, hello, monkeypatch) as world:
        assert (await world.http.get("/v1/models")).status_code == 200


def test_no_score_keeps_its_query_in_one_engine(config: FleetConfig):
    """Its documents may be sent to others, which would die of it."""
    args = openai_app_module.server_args(config.model, [])
    assert args.enable_flash_late_interaction is False
