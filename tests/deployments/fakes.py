"""What a llumlet stands on: a step thread, an engine, and the two sides of migration."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

from deployments.llumlet import Llumlet
from migration.ownership import Outcome, Owned
from migration.protocol.messages import Reserve, Reserved
from migration.snapshot import (
    CannotMove,
    MigrationRecord,
    Snapshot,
    Submission,
    UnknownRequest,
)


def submission(
    request_id: str = "r1", priority_class: str = "normal", fingerprint: str = "tiny"
) -> Submission:
    return Submission(
        request_id, f"public-{request_id}", b"", 10, priority_class, "tcp://ingress", fingerprint
    )


class Steps:
    """A step thread that runs commands in order: at once, or once `go_on` is called."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.busy = False
        self._queue: list[tuple[Any, asyncio.Future[Any]]] = []

    async def run(self, command: Any) -> Any:
        answer = asyncio.get_running_loop().create_future()
        self._queue.append((command, answer))
        if not self.busy:
            self.go_on()
        return await answer

    def go_on(self) -> None:
        self.busy = False
        while self._queue:
            command, answer = self._queue.pop(0)
            if answer.cancelled():
                continue
            try:
                if self.error is not None:
                    raise self.error
                answer.set_result(command())
            except Exception as error:
                answer.set_exception(error)


class Engine:
    """Requests, blocks and a queue, set by the test.

    `continued`: the tokens that requests went on from, once their grammar was compiled.
    """

    block_size = 16
    max_batch = 4

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}
        self.blocks_total, self.blocks_free = 100, 100
        self.queue: list[str] = []
        self.fixed: set[str] = set()
        self.continued: dict[str, tuple[int, ...]] = {}
        self.compiling: Future[None] | None = None

    def add(self, submission: Submission) -> None:
        self.give(submission.request_id)

    def give(self, request_id: str, **rest: Any) -> None:
        defaults = {"request_id": request_id, "num_tokens": 20, "num_computed_tokens": 19}
        defaults |= {"max_tokens": 100, "num_output_tokens": 10, "priority": 0}
        defaults["arrival_time"] = float(len(self.known))
        self.known[request_id] = SimpleNamespace(**defaults | rest)

    def revive(self, snapshot: Snapshot) -> str:
        return snapshot.submission.request_id

    def grammar(self, revived: str) -> Future[None] | None:
        return self.compiling

    def install(self, revived: str, snapshot: Snapshot) -> None:
        self.continued[revived] = snapshot.output_token_ids
        self.give(revived, num_output_tokens=len(snapshot.output_token_ids))

    def drop(self, request_id: str) -> None:
        self.known.pop(request_id, None)

    def check_movable(self, request_id: str) -> Any:
        if request_id not in self.known:
            raise UnknownRequest("the request has finished")
        if request_id in self.fixed:
            raise CannotMove("it has images")
        return self.known[request_id]

    def requests(self) -> dict[str, Any]:
        return self.known

    def running(self) -> list[Any]:
        return [r for name, r in self.known.items() if name not in self.queue]

    def waiting(self) -> list[Any]:
        return [self.known[name] for name in self.queue]

    def counts(self) -> tuple[int, int]:
        return len(self.running()), len(self.queue)

    def head_of_line(self) -> Any:
        return next(iter(self.waiting()), None)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)


class Outgoing:
    """The source's side: a move ends as `outcome` says, when the test lets it."""

    def __init__(self) -> None:
        self.outcome = "completed"
        self.moves: list[tuple[str, str, str]] = []
        self.begun = asyncio.Event()
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def move(self, owned: Owned, destination: str, reason: Any) -> MigrationRecord:
        self.moves.append((owned.submission.request_id, destination, reason))
        owned.migrating = True
        self.begun.set()
        await self.may_end.wait()
        owned.migrating = False
        if self.outcome == "completed":
            owned.leave(Outcome("moved", destination))
        request_id = owned.submission.request_id
        return MigrationRecord(request_id, "here", destination, reason, self.outcome, blocks=3)


class Incoming:
    """The destination's side: it takes whatever is offered."""

    def __init__(self) -> None:
        self.expired = 0

    def __len__(self) -> int:
        return 1

    async def expire(self) -> None:
        self.expired += 1

    async def reserve(self, message: Reserve) -> Reserved:
        return Reserved(capacity=message.tokens, cached_blocks=0)


ORPHAN_S = 10.0


class Instance:
    """A llumlet on all of these. `now` is its clock."""

    def __init__(self, max_concurrent: int = 2) -> None:
        self.now = 100.0
        self.steps, self.engine = Steps(), Engine()
        self.outgoing, self.incoming = Outgoing(), Incoming()
        self.records: list[MigrationRecord] = []
        self.llumlet = Llumlet(
            "here",
            "tiny",
            self.steps,  # type: ignore[arg-type]
            self.engine,  # type: ignore[arg-type]
            {"high": 160, "normal": 0},
            max_concurrent,
            ORPHAN_S,
            lambda _, record: self.records.append(record),
            clock=lambda: self.now,
        )
        self.llumlet.connect(self.outgoing, self.incoming)  # type: ignore[arg-type]

    async def submitted(
        self, request_id: str = "r1", tokens: Sequence[int] = (), **rest: Any
    ) -> asyncio.Task[Outcome]:
        """An open call of an ingress, whose request the engine has."""
        call = asyncio.create_task(self.llumlet.submit(submission(request_id, **rest), tokens))
        await let_others_run()
        assert request_id in self.engine.known
        return call


async def let_others_run() -> None:
    """Every task that can go on does, until all of them wait for something."""
    for _ in range(20):
        await asyncio.sleep(0)
