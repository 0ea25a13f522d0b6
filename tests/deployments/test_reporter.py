"""The replica's reports and what it does with the answers, in virtual time."""

import asyncio

import pytest

from deployments.engine_loop import EngineDead
from deployments.messages import Orders, Report
from deployments.policy.load import InstanceLoad
from deployments.policy.pairing import Target
from deployments.reporter import (
    BUSY_INTERVAL_S,
    COALESCE_S,
    FAILED_PAUSE_S,
    IDLE_INTERVAL_S,
    REPORT_TIMEOUT_S,
    Reporter,
)
from migration.snapshot import MigrationRecord
from tests.virtual import virtually

MOVE_S = 3.0


class Llumlet:
    """With `running` requests; moves take a while."""

    replica_id = "here"
    slots = 2

    def __init__(self, running=1):
        self.running, self.draining = running, False
        self.error = None
        self.changed = asyncio.Event()
        self.swept = 0
        self.obeyed = []
        self.outcome = "completed"

    async def report(self):
        if self.error:
            raise self.error
        return Report(InstanceLoad("here", "running", running=self.running))

    async def housekeeping(self):
        self.swept += 1

    async def obey(self, orders, reason):
        self.obeyed.append((orders.targets[0].replica_id, reason))
        await asyncio.sleep(MOVE_S)
        return MigrationRecord("r1", "here", "there", reason, self.outcome)


class Scheduler:
    """Answers with `orders`, or `fails`; remembers when it was told what."""

    def __init__(self, destination=None):
        targets = (Target(destination, 100.0),) if destination else ()
        self.orders, self.fails = Orders(targets), False
        self.times, self.observed = [], []

    async def report(self, report):
        self.times.append(asyncio.get_running_loop().time())
        if self.fails:
            await asyncio.sleep(3600)
        return self.orders


def started(llumlet, scheduler, obeys=True):
    Reporter(llumlet, scheduler.report, scheduler.observed.append, obeys).start()


@virtually
async def test_a_busy_instance_reports_ten_times_a_second_and_an_idle_one_once():
    for running, interval in ((1, BUSY_INTERVAL_S), (0, IDLE_INTERVAL_S)):
        scheduler = Scheduler()
        begun = asyncio.get_running_loop().time()
        started(Llumlet(running), scheduler)
        await asyncio.sleep(2.5 * interval)
        assert scheduler.times == [pytest.approx(begun + n * interval) for n in range(3)]


@virtually
async def test_changes_close_together_are_told_in_one_report():
    llumlet, scheduler = Llumlet(running=0), Scheduler()
    started(llumlet, scheduler)
    await asyncio.sleep(0.5)
    for _ in range(3):
        llumlet.changed.set()
        await asyncio.sleep(COALESCE_S / 4)
    await asyncio.sleep(0.1)
    assert scheduler.times == [0, pytest.approx(0.5 + COALESCE_S)]


@virtually
async def test_every_report_is_observed_and_followed_by_housekeeping():
    llumlet, scheduler = Llumlet(), Scheduler()
    started(llumlet, scheduler)
    await asyncio.sleep(2.5 * BUSY_INTERVAL_S)
    assert len(scheduler.observed) == llumlet.swept == 3


@virtually
async def test_a_scheduler_that_does_not_answer_is_told_again():
    llumlet, scheduler = Llumlet(), Scheduler("there")
    scheduler.fails = True
    started(llumlet, scheduler)
    await asyncio.sleep(1.5 * REPORT_TIMEOUT_S)
    scheduler.fails = False
    await asyncio.sleep(REPORT_TIMEOUT_S)
    assert llumlet.swept > 2
    assert llumlet.obeyed == [("there", "balance")]


@virtually
async def test_a_restarted_scheduler_hears_at_once_of_idle_instances():
    """Serve holds calls back until there is a replica: nearly always one of them waits there."""
    llumlet, scheduler = Llumlet(running=0), Scheduler()
    scheduler.fails = True
    started(llumlet, scheduler)
    await asyncio.sleep(3.5 * (REPORT_TIMEOUT_S + BUSY_INTERVAL_S))
    assert scheduler.times == [
        pytest.approx(n * (REPORT_TIMEOUT_S + BUSY_INTERVAL_S)) for n in range(4)
    ]


@virtually
async def test_a_dead_engine_reports_no_more():
    llumlet, scheduler = Llumlet(), Scheduler()
    started(llumlet, scheduler)
    await asyncio.sleep(1.5 * BUSY_INTERVAL_S)
    llumlet.error = EngineDead()
    await asyncio.sleep(5)
    assert len(scheduler.times) == 2


@virtually
async def test_an_error_is_told_in_one_line_and_the_instance_reports_again(caplog):
    llumlet, scheduler = Llumlet(), Scheduler()
    llumlet.error = KeyError("what")
    started(llumlet, scheduler)
    await asyncio.sleep(0.5 * FAILED_PAUSE_S)
    llumlet.error = None
    assert caplog.messages == ["here: reporting failed: KeyError('what')"]
    await asyncio.sleep(FAILED_PAUSE_S)
    assert scheduler.times[0] == pytest.approx(FAILED_PAUSE_S)


@virtually
async def test_one_move_at_a_time_is_made_on_orders():
    llumlet, scheduler = Llumlet(), Scheduler("there")
    started(llumlet, scheduler)
    await asyncio.sleep(MOVE_S / 2)
    assert llumlet.obeyed == [("there", "balance")]
    await asyncio.sleep(MOVE_S)
    assert len(llumlet.obeyed) == 2


@virtually
async def test_a_draining_instance_uses_all_its_slots():
    llumlet, scheduler = Llumlet(), Scheduler("there")
    llumlet.draining = True
    started(llumlet, scheduler)
    await asyncio.sleep(MOVE_S / 2)
    assert llumlet.obeyed == [("there", "drain")] * 2


@virtually
async def test_while_it_drains_the_next_request_leaves_without_waiting_for_a_report():
    llumlet, scheduler = Llumlet(), Scheduler("there")
    llumlet.draining, llumlet.slots = True, 1
    llumlet.outcome = "completed"
    started(llumlet, scheduler)
    await asyncio.sleep(COALESCE_S)
    scheduler.fails = True  # it hears of no other order
    await asyncio.sleep(3.5 * MOVE_S)
    assert llumlet.obeyed == [("there", "drain")] * 4


@virtually
async def test_a_drain_that_moves_nothing_waits_for_the_next_report():
    llumlet, scheduler = Llumlet(), Scheduler("there")
    llumlet.draining, llumlet.slots = True, 1
    llumlet.outcome = "refused"
    started(llumlet, scheduler)
    await asyncio.sleep(COALESCE_S)
    scheduler.fails = True
    await asyncio.sleep(3.5 * MOVE_S)
    assert llumlet.obeyed == [("there", "drain")]


@virtually
async def test_orders_are_not_followed_where_migration_is_off():
    llumlet, scheduler = Llumlet(), Scheduler("there")
    started(llumlet, scheduler, obeys=False)
    await asyncio.sleep(1)
    assert llumlet.obeyed == []
