"""Replicas as an ingress sees them: they hold its calls open, and send what a test says."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any

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
    """`submitted`: the requests whose calls were made, by their id inside the engines; `tokens`:
    the output that they were to go on from.
    """

    def __init__(self) -> None:
        self.inbox = FakeInbox()
        self.submitted: dict[str, Submission] = {}
        self.routes: dict[str, Route] = {}
        self.tokens: dict[str, list[int]] = {}
        self.cancelled: set[str] = set()
        self.arrived = asyncio.Event()
        self._calls: dict[str, asyncio.Future[Outcome]] = {}
        self.handle = FakeHandle({"submit": self._submit, "abort": self._abort})

    def own(self, request_id: str, replica_id: str = "a") -> None:
        """A replica says that it has the request."""
        self.inbox.put(Ownership(replica_id, request_id))

    def send(self, request_id: str, first: int, tokens: Iterable[int], last: bool = False) -> None:
        """Tokens of a request; with the last ones it ends."""
        reason = FinishReason.LENGTH if last else None
        output = EngineCoreOutput(request_id, list(tokens), finish_reason=reason)
        self.inbox.put(Step("a", [first], EngineCoreOutputs(outputs=[output], timestamp=0.0)))
        if last:
            self._calls[request_id].set_result(Outcome("finished"))

    def fail(self, request_id: str, error: Exception) -> None:
        """The open call of a request ends with this."""
        self._calls[request_id].set_exception(error)

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
        self.submitted[name] = submission
        self.routes[name], self.tokens[name] = route, list(tokens)
        self._calls[name] = asyncio.get_running_loop().create_future()
        self.arrived.set()
        try:
            return await self._calls[name]
        except asyncio.CancelledError:
            self.cancelled.add(name)
            raise

    def _abort(self, _: str | None, request_id: str) -> None:
        self.cancelled.add(request_id)


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
