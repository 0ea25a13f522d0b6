import asyncio

import pytest

from deployments import consult as module
from deployments.consult import Consult, NoInstance
from deployments.messages import Ask, Decision
from deployments.policy.load import InstanceLoad
from tests.fakes import FakeHandle

LOADS = (
    InstanceLoad("a", "running", blocks_total=100, freeness=1.0),
    InstanceLoad("b", "running", blocks_total=100, freeness=50.0),
)


class Scheduler:
    """Answers what it is told to; remembers how many requests it was asked for at once."""

    def __init__(self):
        self.batches = []
        self.answer = lambda asks: Decision(("a",) * len(asks), LOADS)
        self.handle = FakeHandle({"choose": self._choose})

    async def _choose(self, _, asks):
        self.batches.append(len(asks))
        answer = self.answer(asks)
        return await answer if asyncio.iscoroutine(answer) else answer


@pytest.fixture
def scheduler():
    return Scheduler()


@pytest.fixture
def consult(scheduler):
    made = Consult("app", "freeness")
    made._handle = scheduler.handle
    return made


async def test_the_schedulers_word_counts(consult):
    assert await consult.choose(Ask("r", 10), ["a", "b"]) == "a"


async def test_requests_that_wait_are_asked_for_together(consult, scheduler):
    asks = (consult.choose(Ask(f"r{i}", 10), ["a", "b"]) for i in range(20))

    assert await asyncio.gather(*asks) == ["a"] * 20
    assert len(scheduler.batches) <= 2


async def test_a_silent_scheduler_is_bypassed_then_left_alone(consult, scheduler, monkeypatch):
    await consult.choose(Ask("r0", 10), ["a", "b"])
    monkeypatch.setattr(module, "CONSULT_TIMEOUT_S", 0.02)
    scheduler.answer = lambda asks: asyncio.Event().wait()

    chosen = [await consult.choose(Ask(f"r{i}", 10), ["a", "b"]) for i in range(1, 5)]

    assert chosen == ["b"] * 4  # the freest of the loads seen last
    assert len(scheduler.batches) == 2  # one answered, one not; then none for a second


async def test_a_choice_that_is_gone_is_replaced(consult, scheduler):
    scheduler.answer = lambda asks: Decision(("dead",), LOADS)

    assert await consult.choose(Ask("r", 10), ["a", "b"]) == "b"


DRAINING = tuple(InstanceLoad(name, "draining", freeness=float("-inf")) for name in "ab")


async def test_while_all_drain_no_instance_takes_a_request(consult, scheduler):
    scheduler.answer = lambda asks: Decision((None,) * len(asks), DRAINING)

    with pytest.raises(NoInstance, match="all are draining"):
        await consult.choose(Ask("r", 10), ["a", "b"])


async def test_an_instance_that_the_scheduler_does_not_know_yet_takes_requests(consult, scheduler):
    scheduler.answer = lambda asks: Decision((None,) * len(asks), DRAINING)

    for _ in range(3):
        assert await consult.choose(Ask("r", 10), ["a", "b", "new"]) == "new"


async def test_without_the_scheduler_nobody_is_known_to_drain(consult, scheduler):
    scheduler.answer = lambda asks: Decision((None,) * len(asks), DRAINING)
    with pytest.raises(NoInstance):
        await consult.choose(Ask("r", 10), ["a", "b"])

    def broken(asks):
        raise ConnectionError

    scheduler.answer = broken
    assert await consult.choose(Ask("r", 10), ["a", "b"]) in ("a", "b")


async def test_without_any_knowledge_replicas_take_turns(consult, scheduler):
    def broken(asks):
        raise ConnectionError

    scheduler.answer = broken

    chosen = [await consult.choose(Ask(f"r{i}", 10), ["a", "b"]) for i in range(4)]

    assert sorted(chosen) == ["a", "a", "b", "b"]
