"""What an ingress believes of its requests: whose they are, where they are, who gets no answer."""

import asyncio
import time

import pytest
from vllm.v1.engine import EngineCoreRequest, FinishReason
from vllm.v1.serial_utils import MsgpackDecoder

from app import request_context
from app.config import PriorityClass
from app.keeper import PLACE_S
from app.priorities import Priorities
from app.refusals import Answer
from app.request_context import RequestContext
from migration.snapshot import MigrationRecord
from tests.app.ingress import Ingress, a_request, at_once
from tests.virtual import virtually

CLASSES = {
    "high": PriorityClass(priority=-10, api_keys=["sk-high"]),
    "normal": PriorityClass(max_queued_tokens=10),
}


@pytest.mark.parametrize(
    ("key", "priority", "placed"),
    [("sk-high", 0, ("high", -10)), ("", -99, ("normal", 0)), ("sk-high", 5, ("normal", 5))],
)
async def test_a_request_is_of_the_class_and_as_urgent_as_its_caller_may_have_it(
    key: str, priority: int, placed: tuple[str, int]
) -> None:
    ingress = Ingress(classes=CLASSES)
    caller = Priorities(CLASSES).caller(f"Bearer {key}")
    token = request_context.current.set(RequestContext(caller=caller))
    await ingress.add("r1", priority=priority)
    request_context.current.reset(token)
    await ingress.replicas.until_submitted(1)

    submission = ingress.replicas.submitted["r1"]
    request = MsgpackDecoder(EngineCoreRequest).decode(submission.request)
    assert (submission.priority_class, request.priority) == placed


@virtually
async def test_a_request_that_no_instance_takes_is_refused_and_its_call_cancelled(start) -> None:
    ingress = start()
    answer = await ingress.add("r1")
    await asyncio.sleep(PLACE_S - 0.1)
    assert answer.refusal is None

    await asyncio.sleep(2)

    assert answer.refusal is not None
    assert answer.refusal.status == 503
    assert "no instance takes the request: none did for 30 s" in answer.refusal.message
    assert (ingress.aborted, ingress.replicas.cancelled) == (["r1"], {"r1"})
    assert ingress.client.journal.live() == []


@virtually
async def test_a_request_that_an_instance_has_may_wait(start) -> None:
    ingress = start()
    answer = await ingress.begin()

    await asyncio.sleep(10 * PLACE_S)

    assert answer.refusal is None
    assert list(ingress.replicas.submitted) == ["r1"]
    assert [entry.request_id for entry in ingress.client.journal.live()] == ["r1"]


@virtually
async def test_a_request_that_is_refused_was_never_there() -> None:
    ingress = Ingress(classes=CLASSES)
    await ingress.add("r1")
    refused = await ingress.add("r2")
    await at_once()

    assert refused.refusal is not None
    assert refused.refusal.status == 429
    assert ingress.aborted == ["r2"]
    assert list(ingress.replicas.submitted) == ["r1"]
    assert ingress.client.journal.find("r2") is None


@virtually
async def test_siblings_of_a_request_that_fails_end_with_it() -> None:
    ingress = Ingress()
    answer = Answer()
    for request_id in ("0_r1", "1_r1", "2_r1"):
        await ingress.add(request_id, answer)
    await at_once()

    ingress.replicas.fail("1_r1", ConnectionError())
    await at_once()

    assert set(ingress.aborted) == {"0_r1", "1_r1", "2_r1", "r1"}
    assert ingress.replicas.cancelled == {"0_r1", "2_r1"}
    assert answer.running == set()


@virtually
async def test_without_an_http_answer_to_refuse_a_request_ends_with_an_error() -> None:
    ingress = Ingress(classes=CLASSES)
    for request_id in ("r1", "r2"):
        await ingress.client.add_request_async(a_request(request_id))
    await at_once()

    assert ingress.ends == {"r2": FinishReason.ERROR}
    assert ingress.aborted == []


@virtually
async def test_each_end_of_a_wait_makes_room() -> None:
    ingress = Ingress(classes=CLASSES)

    async def let_in() -> bool:
        """Whether another HTTP request is; it fills the queue."""
        answer = await ingress.add(f"r{len(ingress.replicas.submitted)}")
        await at_once()
        return answer.refusal is None

    assert await let_in()
    assert not await let_in()
    await ingress.go_on("r0", 65)
    assert await let_in()
    await ingress.client.abort_requests_async(["r1"])
    assert await let_in()
    ingress.replicas.fail("r2", ConnectionError())
    await at_once()
    assert await let_in()


@virtually
async def test_a_move_is_dated_by_the_clock_of_the_ingress_that_hears_of_it(
    start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1.7e9)
    ingress = start()
    await ingress.begin()

    record = MigrationRecord("r1", "a", "b", "balance", "completed", at=5.0)
    ingress.replicas.inbox.put(record)
    await at_once()

    (move,) = ingress.shown()["migrations"]
    assert (move["from"], move["to"], move["at"]) == ("a", "b", 1.7e9)
