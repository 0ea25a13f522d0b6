"""Replicas as an ingress sees them: they hold its calls open, and send what a test says."""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ray.exceptions import ActorDiedError
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

from deployments.messages import Route
from deployments.outbox import Ownership, Step
from migration.ownership import Outcome
from migration.snapshot import Submission
from tests.fakes import FakeHandle


class FakeInbox:
    """An ingress' inbox that a test fills."""

    address = "tcp://ingress"

    def __init__(self) -> None:
        self._messages: asyncio.Queue[Any] = asyncio.Queue()

    def put(self, message: Any) -> None:
        self._messages.put_nowait(message)

    async def receive(self) -> Any:
        return await self._messages.get()

    def close(self) -> None:
        """There is no socket."""


class FakeReplicas:
    """The router sends a request to the first replica that it need not avoid, `a` at first.

    By a request's id inside the engines: `submitted`, those whose calls were made; `routes`, where
    they went; `tokens`, the output that they were to go on from; `cancelled`, whose calls were.
    `attached`, `aborted`: (replica, request id) of each such call, in order; `asked`: the replicas
    that were asked how they are. `dead` ones fail all calls; `hung` ones answer none, and the
    others that their step has been running since `stepping`.
    """

    def __init__(self, names: str = "ab") -> None:
        self.inbox = FakeInbox()
        self.submitted: dict[str, Submission] = {}
        self.routes: dict[str, Route] = {}
        self.tokens: dict[str, list[int]] = {}
        self.cancelled: set[str] = set()
        self.attached: list[tuple[str, str]] = []
        self.aborted: list[tuple[str, str]] = []
        self.asked: list[str] = []
        self.dead: set[str] = set()
        self.hung: set[str] = set()
        self.stepping: dict[str, float] = {}
        self.arrived = asyncio.Event()
        self._names = names
        self._places: dict[str, str] = {}
        self._calls: dict[str, asyncio.Future[Outcome]] = {}
        self.handle = FakeHandle(
            {
                "submit": self._submit,
                "attach": self._attach,
                "abort": self._abort,
                "pulse": self._pulse,
            }
        )

    def own(self, request_id: str, replica_id: str | None = None, first: int | None = None) -> None:
        """A replica says that it has the request from this token on: by default the one where its
        call is open, from those on that came with it.
        """
        replica_id = replica_id or self._places[request_id]
        first = len(self.tokens.get(request_id, ())) if first is None else first
        self.inbox.put(Ownership(replica_id, request_id, first))

    def send(
        self,
        request_id: str,
        first: int,
        tokens: Iterable[int],
        last: bool = False,
        replica_id: str | None = None,
    ) -> None:
        """Tokens of a request, from where its call is open; with the last ones it ends."""
        reason = FinishReason.LENGTH if last else None
        outputs = EngineCoreOutputs(
            outputs=[EngineCoreOutput(request_id, list(tokens), finish_reason=reason)],
            timestamp=0.0,
        )
        self.inbox.put(Step(replica_id or self._places[request_id], [first], outputs))
        if last and not self._calls[request_id].done():
            self.leave(request_id, Outcome("finished"))

    def leave(self, request_id: str, outcome: Outcome) -> None:
        """The open call of a request is answered with this."""
        self._calls[request_id].set_result(outcome)

    def fail(self, request_id: str, error: Exception) -> None:
        """The open call of a request ends with this."""
        self._calls[request_id].set_exception(error)

    def die(self, replica_id: str) -> None:
        """Its process is gone: every call to it fails, now and later."""
        self.dead.add(replica_id)
        for request_id, call in self._calls.items():
            if self._places[request_id] == replica_id and not call.done():
                call.set_exception(ActorDiedError())

    async def until_submitted(self, number: int) -> list[str]:
        """The ids of the first so many requests, once they are here."""
        async with asyncio.timeout(5):
            while len(self.submitted) < number:
                self.arrived.clear()
                await self.arrived.wait()
        return list(self.submitted)[:number]

    async def _submit(
        self, _: str | None, submission: Submission, route: Route, tokens: Sequence[int]
    ) -> Outcome:
        name = submission.request_id
        wanted = [each for each in self._names if each not in route.avoid]
        route.chosen = (wanted or self._names)[0]
        self.submitted[name] = submission
        self.routes[name], self.tokens[name] = route, list(tokens)
        self.arrived.set()
        return await self._hold(route.chosen, name)

    async def _attach(self, replica_id: str, request_id: str) -> Outcome:
        self.attached.append((replica_id, request_id))
        return await self._hold(replica_id, request_id)

    async def _hold(self, replica_id: str, request_id: str) -> Outcome:
        self._places[request_id] = replica_id
        call = self._calls[request_id] = asyncio.get_running_loop().create_future()
        self._reach(replica_id)
        try:
            return await call
        except asyncio.CancelledError:
            self.cancelled.add(request_id)
            raise

    def _abort(self, replica_id: str, request_id: str) -> None:
        self.aborted.append((replica_id, request_id))
        self._reach(replica_id)
        call = self._calls.get(request_id)
        if call is not None and not call.done() and self._places[request_id] == replica_id:
            call.set_result(Outcome("aborted"))

    async def _pulse(self, replica_id: str) -> float:
        self.asked.append(replica_id)
        self._reach(replica_id)
        if replica_id in self.hung:
            await asyncio.Event().wait()
        now = time.monotonic()
        return now - self.stepping.get(replica_id, now)

    def _reach(self, replica_id: str) -> None:
        if replica_id in self.dead:
            raise ActorDiedError


class FakeIngresses:
    """A handle to all ingresses. `answers`: by a method's name, what each of them does when it is
    called: it answers, raises, or waits.
    """

    def __init__(self, **answers: list[Callable[..., Any]]) -> None:
        self.answers = answers
        self.asked: list[tuple[Any, ...]] = []

    def options(self, **_: Any) -> "FakeIngresses":
        return self

    def broadcast(self, method: str, *args: Any) -> "FakeBroadcast":
        self.asked.append((method, *args))
        return FakeBroadcast(self.answers.get(method, []), args)


class FakeBroadcast:
    """Serve's DeploymentBroadcastResponse, as far as we use it."""

    def __init__(self, answers: list[Callable[..., Any]], args: tuple[Any, ...]) -> None:
        self._calls = [FakeResult(answer, args) for answer in answers]

    async def _fetch_replica_results_async(self) -> list["FakeResult"]:
        return self._calls


class FakeResult:
    """Serve's ReplicaResult: one call of a broadcast."""

    def __init__(self, answer: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._answer, self._args = answer, args

    async def get_async(self) -> Any:
        answer = self._answer(*self._args)
        return await answer if asyncio.iscoroutine(answer) else answer
