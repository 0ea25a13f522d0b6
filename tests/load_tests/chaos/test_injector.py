"""The faults as they happen, to a fleet of which nothing is real; in virtual time."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace
from signal import SIGCONT, SIGKILL, SIGSTOP
from types import SimpleNamespace

import pytest

from load_tests.chaos.faults import TAKES
from load_tests.chaos.injector import BACK_S, BURST, Injector
from load_tests.chaos.scenarios import SCENARIOS
from load_tests.fleet_api import NotMoved
from load_tests.servers import ServerFailed
from tests.virtual import virtually

EVERY_S = 10.0


class Machine:
    """A fleet's processes, and what was done to them: of instances a, b, c and of the rest."""

    def __init__(self):
        self.sent = []
        self.up = ["a", "b", "c"]
        self.others = {"Scheduler": [1], "Ingress": [2, 3]}

    def instances(self):
        return {name: self.instance(name) for name in self.up}

    def instance(self, name):
        return SimpleNamespace(pid=name, send_signal=lambda what: self.sent.append((name, what)))

    def of(self, deployment):
        return [self.instance(pid) for pid in self.others[deployment]]


class Api:
    """Answers that a is where the work is, and that any move is on its way at once."""

    def __init__(self, moving=True):
        self.moving = moving

    async def overview(self):
        await asyncio.sleep(0.01)
        numbers = {"migrating_out": int(self.moving), "migrating_in": int(self.moving)}
        return {"replicas": [{"replica_id": r, "running": int(r == "a"), **numbers} for r in "abc"]}

    async def place(self, name):
        return "a"

    async def migrate(self, name, destination=None):
        await asyncio.sleep(1)
        raise NotMoved("it has ended")


class Users:
    """One stream, that runs; and the bursts that were asked for."""

    def __init__(self):
        self.open = [SimpleNamespace(name="chaos-0", arrivals=[1.0])]
        self.bursts = []

    def burst(self, count):
        self.bursts.append(count)


@asynccontextmanager
async def faults(*deck, machine=None, api=None, survivors=1, scenario="kills-emulated"):
    """What does them, while it runs. Each comes about ten seconds after the one before."""
    machine = machine or Machine()
    chosen = replace(
        SCENARIOS[scenario], deck=deck, every_s=EVERY_S, survivors=survivors, instances=3
    )
    injector = Injector(api or Api(), machine, Users(), chosen, seed=0)
    injector.machine, injector.users = machine, injector._crowd
    task = asyncio.create_task(injector.run())
    try:
        yield injector
    finally:
        task.cancel()
        injector.ended = (await asyncio.gather(task, return_exceptions=True))[0]


@virtually
async def test_an_instance_with_work_is_killed_and_counts_as_down():
    async with faults("kill") as injector:
        await asyncio.sleep(1.5 * EVERY_S)
        assert injector.machine.sent == [("a", SIGKILL)]
        assert injector.down == {"a"}
        assert injector.kills == 1
        assert [(event.kind, event.victims) for event in injector.events] == [("kill", ("a",))]


@virtually
async def test_an_instance_that_is_stopped_goes_on():
    async with faults("short hang") as injector:
        await asyncio.sleep(1.4 * EVERY_S)
        assert injector.machine.sent[:2] == [("a", SIGSTOP), ("a", SIGCONT)]
        assert not injector.down
        assert injector.kills == 0


@virtually
async def test_whatever_ends_it_nothing_stays_stopped():
    async with faults("long hang") as injector:
        while not injector.down:
            await asyncio.sleep(0.1)
        assert injector.machine.sent == [("a", SIGSTOP)]
    assert injector.machine.sent == [("a", SIGSTOP), ("a", SIGCONT)]


ENDS = {"source": {"a"}, "destination": {"b", "c"}, "both ends": {"a", "b", "c"}}


@pytest.mark.parametrize("kind", ENDS)
def test_the_ends_of_a_move_are_killed_while_it_is_on_its_way(kind):
    @virtually
    async def check():
        async with faults(kind) as injector:
            await asyncio.sleep(1.5 * EVERY_S)
            (event,) = injector.events
            assert event.kind == kind
            assert set(event.victims) <= ENDS[kind]
            assert len(event.victims) == TAKES[kind]
            assert sorted(injector.machine.sent) == [(v, SIGKILL) for v in sorted(event.victims)]

    check()


@virtually
async def test_where_no_move_is_seen_an_instance_is_killed_without():
    async with faults("source", api=Api(moving=False)) as injector:
        await asyncio.sleep(5 * EVERY_S)
        assert injector.events[0].kind == "kill"


@virtually
async def test_so_many_instances_as_must_be_left_are_left():
    machine = Machine()
    async with faults("kill", machine=machine, survivors=2) as injector:
        await asyncio.sleep(10 * EVERY_S)
        assert injector.kills == 1
        machine.up.append("d")
        await asyncio.sleep(2 * EVERY_S)
        assert injector.kills == 2


@virtually
async def test_a_process_that_does_not_come_back_ends_it():
    async with faults("kill", survivors=2) as injector:
        await asyncio.sleep(3 * EVERY_S + BACK_S)
    assert isinstance(injector.ended, ServerFailed)


@virtually
async def test_the_scheduler_is_killed_and_of_two_ingresses_one():
    async with faults("scheduler", "ingress") as injector:
        await asyncio.sleep(2.8 * EVERY_S)
        assert {pid for pid, _ in injector.machine.sent} & {2, 3}
        assert {event.victims for event in injector.events} == {("Scheduler",), ("Ingress",)}
        assert not injector.down


@virtually
async def test_a_burst_hits_nobody():
    async with faults("burst") as injector:
        await asyncio.sleep(1.5 * EVERY_S)
        assert injector.users.bursts == [BURST]
        assert not injector.machine.sent
