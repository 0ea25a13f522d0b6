import asyncio

from ray.exceptions import ActorUnavailableError

from app.peers import ANSWER_S, Peers, Shown
from tests.app.fakes import FakeBroadcast, FakeIngresses
from tests.virtual import virtually


def told(request_id, ended=False):
    """An ingress that has one request, whatever it is asked."""
    return lambda *_: [Shown(request_id, "", "a", ended, {"request_id": request_id})]


async def hangs(*_):
    await asyncio.Event().wait()


def dies(*_):
    raise ActorUnavailableError("Actor is unavailable.", None)


def nothing(*_):
    return []


async def seconds(asking):
    """What it answers, and how long that took."""
    started = asyncio.get_running_loop().time()
    answer = await asking
    return answer, asyncio.get_running_loop().time() - started


async def test_what_all_others_tell_is_one_list():
    peers = Peers(FakeIngresses(shown=[told("r1"), nothing, told("r2")]), "me")

    assert [each.request_id for each in await peers.shown()] == ["r1", "r2"]


async def test_each_is_told_who_asks_so_that_this_one_answers_nothing():
    ingresses = FakeIngresses(shown=[nothing], recoveries=[lambda asker: 0])
    peers = Peers(ingresses, "me")

    assert await peers.shown("mine") == []
    assert await peers.recoveries() == 0
    assert ingresses.asked == [("shown", "me", "mine"), ("recoveries", "me")]


@virtually
async def test_the_dead_cost_nothing():
    peers = Peers(FakeIngresses(shown=[dies, told("r1")]), "me")

    (only,), waited = await seconds(peers.shown())

    assert (only.request_id, waited) == ("r1", 0)


@virtually
async def test_one_that_hangs_costs_a_moment_and_nobody_elses_answer(caplog):
    peers = Peers(FakeIngresses(recoveries=[hangs, lambda _: 2, lambda _: 3]), "me")

    recoveries, waited = await seconds(peers.recoveries())

    assert (recoveries, waited) == (5, ANSWER_S)
    assert [line.getMessage() for line in caplog.records] == [
        "an ingress does not answer (TimeoutError)"
    ]


@virtually
async def test_where_nobody_can_be_asked_nothing_is_known(monkeypatch):
    monkeypatch.setattr(FakeBroadcast, "_fetch_replica_results_async", hangs)

    assert await seconds(Peers(FakeIngresses(), "me").shown()) == ([], ANSWER_S)
