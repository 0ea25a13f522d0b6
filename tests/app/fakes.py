"""Replicas as an ingress sees them: they hold its calls open, and send what a test says."""

import asyncio
from collections.abc import Iterable
from typing import Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

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
    """`submitted`: the requests whose calls were made, by their id inside the engines."""

    def __init__(self) -> None:
        self.inbox = FakeInbox()
        self.submitted: dict[str, Submission] = {}
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

    async def _submit(self, _: str | None, submission: Submission) -> Outcome:
        name = submission.request_id
        self.submitted[name] = submission
        self._calls[name] = asyncio.get_running_loop().create_future()
        self.arrived.set()
        try:
            return await self._calls[name]
        except asyncio.CancelledError:
            self.cancelled.add(name)
            raise

    def _abort(self, _: str | None, request_id: str) -> None:
        self.cancelled.add(request_id)
