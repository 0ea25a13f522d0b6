"""Pair groups, and jobs on the workers of an engine that has two ranks, or one in this process."""

import asyncio
from collections import defaultdict
from itertools import count

import pytest

from migration import links as module
from migration.links import IDLE_S, Links
from tests.migration.fakes import Hold, PeerFake, let_others_run
from tests.virtual import virtually

PEER = PeerFake()


class Rank:
    """A worker whose jobs take `polls` questions each, and then say `answer`."""

    def __init__(self, answer=100, polls=0):
        self.answer, self.polls = answer, polls
        self.jobs = {}
        self._asked = defaultdict(count)

    def mig_start(self, job, method, *args):
        self.jobs[job] = (method, *args)

    def mig_poll(self, job):
        if next(self._asked[job]) < self.polls:
            return None
        method, *_ = self.jobs[job]
        if method not in ("mig_send", "mig_receive"):
            return 0
        return self.answer


class Engine:
    """Seam and step thread of one engine: it notes which calls were made between two steps."""

    def __init__(self, *ranks, in_process=False):
        self.ranks, self.in_process = ranks, in_process
        self.between_steps, self.beside = [], []
        self.steps = 0
        self._stepping = True

    def workers(self, method, *args):
        (self.beside if self._stepping else self.between_steps).append(method)
        return [getattr(rank, method)(*args) for rank in self.ranks]

    async def run(self, command):
        await asyncio.sleep(0)  # the step that goes on
        self.steps += 1
        self._stepping = False
        try:
            return command()
        finally:
            self._stepping = True

    def did(self, method):
        """The arguments of each such job, on every rank alike."""
        first, *others = (list(rank.jobs.values()) for rank in self.ranks)
        assert all(other == first for other in others)
        return [args for name, *args in first if name == method]


def links(engine):
    return Links("a", engine, engine, "auto")


async def delivered(group):
    return f"to {group}"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(module, "POLL_S", 0)


async def send(links, deliver=delivered):
    return await links.send("b", PEER, [1, 2], deliver)


async def test_remote_workers_are_asked_between_two_steps_only():
    engine = Engine(Rank(), Rank())
    await send(links(engine))
    assert engine.between_steps == ["mig_start", "mig_poll"] * 2  # to join, and to send
    assert engine.beside == []


async def test_the_worker_in_this_process_is_asked_beside_them():
    engine = Engine(Rank(), in_process=True)
    await send(links(engine))
    assert engine.beside == ["mig_start", "mig_poll"] * 2
    assert engine.steps == 0


@pytest.mark.parametrize("polls", [(0, 0), (3, 0), (0, 5), (4, 4)])
async def test_a_copy_ends_with_the_last_rank_and_has_the_bytes_of_all(polls):
    ranks = [Rank(100, polls[0]), Rank(23, polls[1])]
    engine = Engine(*ranks)
    assert tuple(await send(links(engine))) == (123, "to a>b#0")
    assert engine.between_steps.count("mig_poll") == 2 * (max(polls) + 1)


async def test_steps_go_on_while_a_copy_does():
    engine = Engine(Rank(polls=10))
    await send(links(engine))
    assert engine.steps > 10


async def test_no_bytes_are_bytes():
    engine = Engine(Rank(0), Rank(0))
    assert (await send(links(engine)))[0] == 0


async def test_a_link_is_made_once():
    engine = Engine(Rank(), Rank())
    mine = links(engine)
    await mine.warm("b", PEER)
    await send(mine)
    await send(mine)
    assert engine.did("mig_join") == [["a>b#0", 0, "auto"]]
    assert [group for group, _ in engine.did("mig_send")] == ["a>b#0"] * 2


@pytest.mark.parametrize("failing", [0, 1])
async def test_a_rank_that_fails_drops_the_link_of_all(failing):
    ranks = [Rank(), Rank()]
    engine = Engine(*ranks)
    mine = links(engine)
    ranks[failing].answer = "RuntimeError: the peer died"

    with pytest.raises(RuntimeError, match="the peer died"):
        await send(mine)
    await let_others_run()
    ranks[failing].answer = 100
    await send(mine)

    assert engine.did("mig_leave") == [["a>b#0"]]
    first, second = (group for group, *_ in engine.did("mig_join"))
    assert first == "a>b#0"
    assert second not in (first, "")


async def test_a_failure_is_told_when_every_rank_has_ended():
    """Until then another rank may still write to the blocks."""
    engine = Engine(Rank("RuntimeError: the peer died"), Rank(polls=5))
    with pytest.raises(RuntimeError, match="the peer died"):
        await links(engine).receive("c>a#0", [3])
    assert engine.between_steps.count("mig_poll") == 6


async def test_a_peer_that_fails_drops_it_too():
    engine = Engine(Rank())

    async def refuse(group):
        raise TimeoutError

    with pytest.raises(TimeoutError):
        await send(links(engine), refuse)
    await let_others_run()
    assert engine.did("mig_leave") == [["a>b#0"]]


async def test_a_pair_has_one_transfer_at_a_time():
    engine = Engine(Rank())
    mine = links(engine)
    hold = Hold()

    async def deliver(group):
        await hold()
        return group

    first = asyncio.create_task(send(mine, deliver))
    await hold.reached.wait()
    second = asyncio.create_task(send(mine))
    await let_others_run()
    assert len(engine.did("mig_send")) == 1
    hold.release()
    await asyncio.gather(first, second)
    assert len(engine.did("mig_send")) == 2


async def test_a_new_link_from_the_same_source_takes_the_place_of_its_old_one():
    engine = Engine(Rank(7), Rank(8))
    mine = links(engine)
    await mine.join("c>a#0")
    await mine.join("d>a#0")
    await mine.join("c>a#4")
    await let_others_run()
    assert engine.did("mig_leave") == [["c>a#0"]]
    assert await mine.receive("c>a#4", [3]) == 15


async def test_a_receiver_that_fails_leaves_the_group():
    engine = Engine(Rank(), Rank("ValueError: no bytes"))
    mine = links(engine)
    await mine.join("c>a#0")
    with pytest.raises(RuntimeError, match="no bytes"):
        await mine.receive("c>a#0", [3])
    await let_others_run()
    assert engine.did("mig_leave") == [["c>a#0"]]


@virtually
async def test_a_link_that_nobody_uses_is_given_up_and_made_anew_when_it_is_needed():
    engine = Engine(Rank())
    ours = links(engine)
    await send(ours)
    await asyncio.sleep(IDLE_S - 1)
    await send(ours)
    await asyncio.sleep(IDLE_S - 1)
    ours.expire()
    await let_others_run()
    assert engine.did("mig_leave") == []

    await asyncio.sleep(2)
    ours.expire()
    await let_others_run()
    assert engine.did("mig_leave") == [["a>b#0"]]
    _, group = await send(ours)
    assert group.startswith("to a>b#")
    assert group != "to a>b#0"


@virtually
async def test_the_receiving_end_waits_until_its_source_has_surely_given_up():
    engine = Engine(Rank())
    ours = links(engine)
    await ours.join("x>a#0")
    await asyncio.sleep(IDLE_S)
    await ours.receive("x>a#0", [1])
    await asyncio.sleep(2 * IDLE_S - 1)
    ours.expire()
    await let_others_run()
    assert engine.did("mig_leave") == []

    await asyncio.sleep(2)
    ours.expire()
    await let_others_run()
    assert engine.did("mig_leave") == [["x>a#0"]]
