"""How the Scheduler is asked, and done without while it is gone, in virtual time."""

import asyncio
from collections import Counter

import pytest

from deployments.breaker import PAUSE_S, SETTLING_S
from deployments.consult import CONSULT_TIMEOUT_S, MAX_BATCH, Consult, NoInstance
from deployments.messages import Ask, Decision
from deployments.policy.load import InstanceLoad
from tests.fakes import FakeHandle
from tests.virtual import virtually


def load(name: str, state="running", freeness: float = 100.0) -> InstanceLoad:
    return InstanceLoad(name, state, blocks_total=100, freeness=freeness)


BOTH = (load("a"), load("b"))
DRAINING = tuple(load(name, "draining", float("-inf")) for name in "ab")


class Scheduler:
    """Sends everything to `chosen`; remembers how many requests it was asked for at once."""

    def __init__(self):
        self.loads, self.chosen = BOTH, "a"
        self.batches = []
        self.answers = asyncio.Event()
        self.answers.set()
        self.handle = FakeHandle({"choose": self._choose})

    def dies(self):
        """Serve holds calls back until there is another."""
        self.answers.clear()

    def is_restarted(self, *loads):
        self.loads = loads
        self.answers.set()

    @property
    def probes(self):
        return self.batches.count(0)

    async def _choose(self, _, asks):
        self.batches.append(len(asks))
        await self.answers.wait()
        return Decision((self.chosen,) * len(asks), self.loads)


@pytest.fixture
def scheduler():
    return Scheduler()


@pytest.fixture
def consult(scheduler):
    made = Consult("app", "freeness")
    made._handle = scheduler.handle
    return made


def now():
    return asyncio.get_running_loop().time()


async def chosen(consult, candidates="ab", n=1):
    """Where n requests go that come one after the other."""
    return [await consult.choose(Ask(f"r{i}", 10), list(candidates)) for i in range(n)]


async def together(consult, n):
    """Where n requests go that come at once."""
    return await asyncio.gather(*(consult.choose(Ask(f"r{i}", 10), ["a", "b"]) for i in range(n)))


async def asked_again(consult, scheduler, candidates="ab"):
    """How long it takes, with a request every 10 ms, until one is asked for again. None waits."""
    begun, asked = now(), sum(scheduler.batches)
    while sum(scheduler.batches) == asked:
        before = now()
        await chosen(consult, candidates)
        assert now() == before
        await asyncio.sleep(0.01)
    return now() - begun


@virtually
async def test_the_schedulers_word_counts(consult):
    assert await chosen(consult, n=5) == ["a"] * 5


@virtually
async def test_requests_that_wait_are_asked_for_together(consult, scheduler):
    assert await together(consult, 20) == ["a"] * 20
    assert len(scheduler.batches) <= 2


@virtually
async def test_a_choice_that_is_gone_is_replaced(consult, scheduler):
    scheduler.chosen = "dead"
    assert await chosen(consult) == ["b"]


@virtually
async def test_one_that_drains_replaces_a_choice_that_is_gone_rather_than_none(consult, scheduler):
    scheduler.chosen, scheduler.loads = "dead", DRAINING
    assert Counter(await chosen(consult, n=4)) == {"a": 2, "b": 2}


@virtually
async def test_when_the_scheduler_dies_the_first_wait_for_one_timeout_and_nobody_after(
    consult, scheduler
):
    await chosen(consult)
    scheduler.dies()
    died = now()
    await together(consult, 3 * MAX_BATCH)
    assert now() == pytest.approx(died + CONSULT_TIMEOUT_S)
    await chosen(consult, n=100)
    assert now() == pytest.approx(died + CONSULT_TIMEOUT_S)


@virtually
async def test_a_scheduler_that_fails_at_once_is_not_waited_for(consult):
    async def fails(_, asks):
        raise ConnectionError

    consult._handle = FakeHandle({"choose": fails})
    assert Counter(await chosen(consult, n=4)) == {"a": 2, "b": 2}
    assert now() == 0


@virtually
async def test_requests_spread_while_the_scheduler_is_dead(consult, scheduler):
    await chosen(consult)
    scheduler.dies()
    assert Counter(await together(consult, 20)) == {"a": 10, "b": 10}
    assert Counter(await chosen(consult, n=20)) == {"a": 10, "b": 10}


@virtually
async def test_no_request_waits_to_learn_that_the_scheduler_is_still_dead(consult, scheduler):
    scheduler.dies()
    await chosen(consult)
    died = now()
    while now() < died + 5:
        before = now()
        await chosen(consult)
        assert now() == before
        await asyncio.sleep(0.01)
    assert sum(scheduler.batches) == 1, "it was asked for others than the first"
    assert scheduler.probes == pytest.approx(5 / (PAUSE_S + CONSULT_TIMEOUT_S), abs=2)


@virtually
async def test_where_no_request_comes_nobody_asks_for_the_scheduler(consult, scheduler):
    scheduler.dies()
    await chosen(consult)
    await asyncio.sleep(60)
    assert scheduler.probes == 0
    await chosen(consult)
    await asyncio.sleep(60)
    assert scheduler.probes == 1


@virtually
async def test_a_scheduler_that_is_back_is_asked_again(consult, scheduler):
    scheduler.dies()
    await chosen(consult)
    await asyncio.sleep(2)
    scheduler.is_restarted(*BOTH)
    assert await asked_again(consult, scheduler) < 0.1
    assert await chosen(consult, n=5) == ["a"] * 5


@virtually
async def test_a_restarted_scheduler_is_asked_once_it_knows_all_instances(consult, scheduler):
    await chosen(consult)
    scheduler.dies()
    await chosen(consult)
    await asyncio.sleep(2)
    scheduler.is_restarted(load("a"))
    assert Counter(await chosen(consult, n=10)) == {"a": 5, "b": 5}
    await asyncio.sleep(PAUSE_S)
    assert Counter(await chosen(consult, n=10)) == {"a": 5, "b": 5}
    scheduler.is_restarted(*BOTH)
    assert await asked_again(consult, scheduler) < PAUSE_S + 0.1


@virtually
async def test_an_instance_that_stays_silent_is_not_waited_for_long(consult, scheduler):
    scheduler.dies()
    await chosen(consult)
    scheduler.is_restarted(load("a"))
    patience = PAUSE_S + SETTLING_S
    assert await asked_again(consult, scheduler) == pytest.approx(patience, abs=0.1)
    assert await chosen(consult, n=5) == ["a"] * 5


@virtually
async def test_only_instances_that_a_request_may_go_to_are_waited_for(consult, scheduler):
    scheduler.dies()
    await chosen(consult, "a")
    scheduler.is_restarted(load("a"))
    assert await asked_again(consult, scheduler, "a") < PAUSE_S + 0.1


@virtually
async def test_an_outage_is_told_in_two_lines(consult, scheduler, caplog):
    caplog.set_level("INFO")
    scheduler.dies()
    await chosen(consult)
    for _ in range(5):
        await asyncio.sleep(PAUSE_S + CONSULT_TIMEOUT_S)
        await chosen(consult)
    scheduler.is_restarted(*BOTH)
    await asked_again(consult, scheduler)
    assert caplog.messages == ["scheduler bypassed: TimeoutError", "scheduler is asked again"]


@virtually
async def test_while_all_drain_no_instance_takes_a_request(consult, scheduler):
    scheduler.chosen, scheduler.loads = None, DRAINING
    with pytest.raises(NoInstance, match="all are draining"):
        await chosen(consult)


@virtually
async def test_an_instance_that_the_scheduler_does_not_know_yet_takes_requests(consult, scheduler):
    scheduler.chosen, scheduler.loads = None, DRAINING
    assert await chosen(consult, ["a", "b", "new"], n=3) == ["new"] * 3


@virtually
async def test_without_the_scheduler_nobody_is_refused_because_all_were_draining(
    consult, scheduler
):
    scheduler.chosen, scheduler.loads = None, DRAINING
    with pytest.raises(NoInstance):
        await chosen(consult)
    scheduler.dies()
    assert Counter(await chosen(consult, n=4)) == {"a": 2, "b": 2}
