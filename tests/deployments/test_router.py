"""Which replica a call goes to, without Serve."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from deployments.consult import NoInstance
from deployments.messages import Ask, Route
from deployments.pinned import ReplicaGone
from deployments.router import UNREACHABLE_S, FleetRouter
from tests.deployments.fakes import submission


class Consult:
    """Chooses the last of the candidates, if it `answers` anything."""

    def __init__(self) -> None:
        self.asked: list[tuple[Ask, list[str]]] = []
        self.error: Exception | None = None

    async def choose(self, ask: Ask, candidates: list[str]) -> str:
        self.asked.append((ask, candidates))
        if self.error is not None:
            raise self.error
        return candidates[-1]


class Id(NamedTuple):
    unique_id: str


class Replica:
    def __init__(self, name: str, fingerprint: str) -> None:
        self.replica_id = Id(name)
        self.replica_metadata = {"fingerprint": fingerprint}


class Router(FleetRouter):
    """Among two replicas of one model and one of another."""

    def __init__(self) -> None:
        self.fleet = [Replica("a", "tiny"), Replica("b", "tiny"), Replica("c", "large")]
        self._consult = self.consult = Consult()  # type: ignore[assignment]
        self._left: dict[str, Any] = {}
        self._unreachable: dict[str, float] = {}
        self._replica_queue_len_cache = SimpleNamespace(invalidate_key=lambda _: None)
        self._queue_len_gauge_last_update: dict[Any, float] = {}
        self._headroom_tokens = {"high": 1600}
        self._pending_requests_by_id: dict[str, Any] = {}
        self._seconds = SimpleNamespace(observe=lambda _: None)  # type: ignore[assignment]

    @property
    def curr_replicas(self) -> dict[Any, Any]:
        return {replica.replica_id: replica for replica in self.fleet}

    async def submit(self, avoid: str = "", tokens: tuple[int, ...] = (), **rest: Any) -> str:
        """Where a request goes, which goes on from these tokens; `told`: what the ingress hears."""
        self.told = Route(frozenset(avoid))
        return await self.route(submission(**rest), self.told, tokens)

    async def route(self, *args: Any, pin: str = "", created_at: float = 0.0) -> str:
        """The id of the replica that a call goes to. Raises what the caller gets."""
        answer = asyncio.get_running_loop().create_future()
        pending: Any = SimpleNamespace(
            args=args,
            created_at=created_at or time.time(),
            future=answer,
            metadata=SimpleNamespace(session_id=pin, internal_request_id="call"),
            routing_context=SimpleNamespace(should_backoff=False),
        )
        self._pending_requests_by_id["call"] = pending
        ((chosen,),) = await self.choose_replicas(self.fleet, pending)  # type: ignore[arg-type]
        assert pending.routing_context.should_backoff
        if answer.done():
            answer.result()
        name: str = chosen.replica_id.unique_id
        return name


@pytest.fixture
def router() -> Router:
    return Router()


async def test_a_request_goes_where_the_scheduler_says_among_instances_of_its_model(router):
    assert await router.submit() == router.told.chosen == "b"
    assert router.consult.asked == [(Ask("r1", 10, "tiny"), ["a", "b"])]


async def test_the_scheduler_is_told_of_the_headroom_that_a_request_s_class_wants(router):
    await router.submit(priority_class="high")
    ((ask, _),) = router.consult.asked
    assert (ask.priority_class, ask.headroom_tokens) == ("high", 1600)


async def test_what_a_request_had_generated_is_to_be_computed_with_its_prompt(router):
    await router.submit(tokens=(11, 12, 13))
    ((ask, _),) = router.consult.asked
    assert ask.prompt_tokens == 13


async def test_a_request_whose_model_nobody_runs_any_more_is_told_so(router):
    with pytest.raises(NoInstance, match="model"):
        await router.submit(fingerprint="gone")
    assert router.consult.asked == []


async def test_a_request_that_nobody_takes_is_told_so(router):
    router.consult.error = NoInstance("all instances are draining")
    with pytest.raises(NoInstance, match="draining"):
        await router.submit()
    assert router._pending_requests_by_id == {}, "Serve keeps it for ever"


async def test_a_request_avoids_instances_that_are_lost_or_hang(router):
    assert await router.submit(avoid="bz") == "a"
    assert router.consult.asked == [(Ask("r1", 10, "tiny", avoid=frozenset("b")), ["a"])]


async def test_a_replica_that_could_not_be_reached_is_avoided_until_serve_knows(
    router, monkeypatch
):
    router.on_replica_actor_unavailable(Id("b"))
    assert await router.submit() == "a"
    later = time.time() + UNREACHABLE_S
    monkeypatch.setattr(time, "time", lambda: later)
    assert await router.submit() == "b"


@pytest.mark.parametrize(("avoid", "asked"), [("ab", 0), ("a", 1)])
async def test_where_no_other_takes_it_a_request_goes_to_one_that_it_should_avoid(
    router, avoid, asked
):
    router.consult.error = NoInstance("all instances are draining")
    chosen = await router.submit(avoid=avoid)
    assert chosen == router.told.chosen
    assert chosen in avoid
    assert len(router.consult.asked) == asked


async def test_a_pinned_call_goes_to_its_replica_whatever_that_runs(router):
    assert await router.route("r1", pin="c") == "c"


async def test_a_call_pinned_to_a_replica_that_is_gone_fails_at_once(router):
    with pytest.raises(ReplicaGone, match="z"):
        await router.route("r1", pin="z")


async def test_a_pinned_call_is_tried_once_where_its_replica_cannot_be_reached(router):
    called = time.time()
    router.on_replica_actor_unavailable(Id("a"))
    with pytest.raises(ReplicaGone, match="a cannot be reached"):
        await router.route("r1", pin="a", created_at=called)
    assert await router.route("r1", pin="a", created_at=time.time() + 1) == "a"


async def test_other_calls_come_to_every_replica(router):
    """A new ingress asks until one that runs its model answers."""
    assert {await router.route() for _ in range(200)} == {"a", "b", "c"}
