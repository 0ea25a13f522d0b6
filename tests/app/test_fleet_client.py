"""What an ingress believes of its requests: where they are, when they moved, who has them."""

import asyncio
import time
from types import SimpleNamespace

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest, FinishReason
from vllm.v1.serial_utils import MsgpackDecoder

from app import refusals, request_context
from app.config import PriorityClass, RecoveryConfig
from app.fleet_client import FleetClient
from app.gate import Gate
from app.keeper import PLACE_S
from app.priorities import Priorities
from app.refusals import Answer
from app.request_context import RequestContext
from tests.app.fakes import FakeReplicas
from tests.virtual import virtually

CLASSES = {
    "high": PriorityClass(priority=-10, api_keys=["sk-high"]),
    "normal": PriorityClass(max_queued_tokens=10),
}


class Ingress:
    """A FleetClient over replicas that do what the test says; `ended`: what vLLM was to abort."""

    def __init__(self, recovery: RecoveryConfig = RecoveryConfig()) -> None:
        self.replicas = FakeReplicas()
        self.client = FleetClient(
            self.replicas.handle,  # type: ignore[arg-type]
            self.replicas.inbox,  # type: ignore[arg-type]
            SimpleNamespace(fingerprint="fingerprint"),  # type: ignore[arg-type]
            Priorities(CLASSES),
            Gate(CLASSES),
            recovery,
        )
        self.ended: list[str] = []
        self.client.endings.connect(self._abort)

    async def add(self, request_id: str, prompt_tokens: int = 8, priority: int = 0) -> None:
        """As AsyncLLM does."""
        request = EngineCoreRequest(
            priority=priority,
            request_id=request_id,
            prompt_token_ids=list(range(prompt_tokens)),
            mm_features=None,
            sampling_params=SamplingParams(),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
            external_req_id=request_id,
        )
        await self.client.add_request_async(request)

    async def _abort(self, request_ids: list[str]) -> None:
        self.ended += request_ids
        await self.client.abort_requests_async(request_ids)


@pytest.fixture
def answer():
    """That of the HTTP request which the test runs in."""
    mine = Answer()
    token = refusals.current.set(mine)
    yield mine
    refusals.current.reset(token)


def in_virtual_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", asyncio.get_running_loop().time)


@pytest.mark.parametrize(
    ("key", "priority", "placed"),
    [("sk-high", 0, ("high", -10)), ("", -99, ("normal", 0)), ("sk-high", 5, ("normal", 5))],
)
async def test_a_request_is_of_the_class_and_as_urgent_as_its_caller_may_have_it(
    key: str, priority: int, placed: tuple[str, int]
) -> None:
    ingress = Ingress()
    caller = Priorities(CLASSES).caller(f"Bearer {key}")
    token = request_context.current.set(RequestContext(caller=caller))
    await ingress.add("r1", priority=priority)
    request_context.current.reset(token)
    await ingress.replicas.until_submitted(1)

    submission = ingress.replicas.submitted["r1"]
    request = MsgpackDecoder(EngineCoreRequest).decode(submission.request)
    assert (submission.priority_class, request.priority) == placed


@virtually
async def test_a_request_that_no_instance_takes_is_refused_and_its_call_cancelled(
    monkeypatch: pytest.MonkeyPatch, answer: Answer
) -> None:
    in_virtual_time(monkeypatch)
    ingress = Ingress()
    await ingress.add("r1")
    await asyncio.sleep(PLACE_S - 0.1)
    assert answer.refusal is None

    await asyncio.sleep(2)

    assert answer.refusal is not None
    assert answer.refusal.status == 503
    assert "no instance takes the request: none did for 30 s" in answer.refusal.message
    assert (ingress.ended, ingress.replicas.cancelled) == (["r1"], {"r1"})
    assert ingress.client.journal.live() == []


@virtually
async def test_a_request_that_an_instance_has_may_wait(
    monkeypatch: pytest.MonkeyPatch, answer: Answer
) -> None:
    in_virtual_time(monkeypatch)
    ingress = Ingress()
    await ingress.add("r1")
    ingress.replicas.own("r1")

    await asyncio.sleep(10 * PLACE_S)

    assert answer.refusal is None
    assert [entry.submission.request_id for entry in ingress.client.journal.live()] == ["r1"]


@virtually
async def test_a_request_that_is_refused_was_never_there(answer: Answer) -> None:
    ingress = Ingress()
    await ingress.add("r1")
    refused = Answer()
    refusals.current.set(refused)

    await ingress.add("r2")
    await asyncio.sleep(0.1)

    assert refused.refusal is not None
    assert refused.refusal.status == 429
    assert ingress.ended == ["r2"]
    assert list(ingress.replicas.submitted) == ["r1"]
    assert ingress.client.journal.find("r2") is None


@virtually
async def test_siblings_of_a_request_that_fails_end_with_it(answer: Answer) -> None:
    ingress = Ingress()
    for request_id in ("0_r1", "1_r1", "2_r1"):
        await ingress.add(request_id)
    await ingress.replicas.until_submitted(3)

    ingress.replicas.fail("1_r1", ConnectionError())
    await asyncio.sleep(0.1)

    assert set(ingress.ended) == {"0_r1", "1_r1", "2_r1", "r1"}
    assert ingress.replicas.cancelled == {"0_r1", "2_r1"}
    assert answer.running == set()


@virtually
async def test_without_an_http_answer_to_refuse_a_request_ends_with_an_error() -> None:
    ingress = Ingress()
    await ingress.add("r1")
    await ingress.add("r2")

    (output,) = (await ingress.client.get_output_async()).outputs

    assert (output.request_id, output.finish_reason) == ("r2", FinishReason.ERROR)
    assert ingress.ended == []


@virtually
async def test_each_end_of_a_wait_makes_room(answer: Answer) -> None:
    ingress = Ingress()

    async def let_in() -> bool:
        """Whether another HTTP request is; it fills the queue."""
        mine = Answer()
        refusals.current.set(mine)
        name = f"r{len(ingress.replicas.submitted)}"
        await ingress.add(name)
        await asyncio.sleep(0.1)
        return mine.refusal is None

    assert await let_in()
    assert not await let_in()
    ingress.replicas.send("r0", 0, [65])
    await asyncio.sleep(0.1)
    assert await let_in()
    await ingress.client.abort_requests_async(["r1"])
    assert await let_in()
    ingress.replicas.fail("r2", ConnectionError())
    await asyncio.sleep(0.1)
    assert await let_in()
