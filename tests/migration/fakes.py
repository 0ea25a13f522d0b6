"""Two instances reduced to what the protocol of a move sees of them."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

from migration.destination import Limits, MigrateIn
from migration.engine_seam import Reservation, Standing
from migration.ownership import Outcome, Owned
from migration.peer import Peer
from migration.protocol.messages import Commit, Extend, Refused, Reserve, Reserved, Stage
from migration.snapshot import Snapshot, Submission, UnknownRequest
from migration.source import MigrateOut

BLOCK = 16
TIMEOUT_S = 5.0
SHORT_S = 0.05
"""For tests in which something must time out."""


def submission(request_id: str = "r1") -> Submission:
    return Submission(request_id, f"public-{request_id}", b"", 40, "normal", "tcp://ingress")


def owned(request_id: str = "r1") -> Owned:
    return Owned(submission(request_id))


async def let_others_run() -> None:
    """Every task that can go on does, until all of them wait for something."""
    for _ in range(20):
        await asyncio.sleep(0)


class Hold:
    """A call that a test stops on its way: wait until `reached`, then `release` it."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self._released = asyncio.Event()

    def release(self) -> None:
        self._released.set()

    async def __call__(self) -> None:
        self.reached.set()
        await self._released.wait()


class Silence:
    """In the way of a message: nobody ever answers it."""

    async def __call__(self) -> None:
        await asyncio.get_running_loop().create_future()


TIMED_OUT = Silence()


class Steps:
    """A step thread that runs commands at once, but for those that a test holds back.

    `hold`: the command is still queued, so that a cancelled caller takes it back. `hold_running`:
    it has begun, and goes on even if its caller is cancelled.
    """

    def __init__(self) -> None:
        self._queued: dict[str, Hold] = {}
        self._running: dict[str, Hold] = {}
        self._one_at_a_time = asyncio.Lock()

    def hold(self, command: str) -> Hold:
        return self._queued.setdefault(command, Hold())

    def hold_running(self, command: str) -> Hold:
        return self._running.setdefault(command, Hold())

    async def run(self, command: Callable[[], Any]) -> Any:
        name = command.func.__name__  # type: ignore[attr-defined]
        if name in self._running:
            return await asyncio.shield(asyncio.create_task(self._in_turn(command)))
        return await self._in_turn(command)

    async def _in_turn(self, command: Callable[[], Any]) -> Any:
        name = command.func.__name__  # type: ignore[attr-defined]
        async with self._one_at_a_time:
            if hold := self._running.get(name) or self._queued.get(name):
                await hold()
            return command()


class Seam:
    """An engine reduced to who runs, who is parked, and whose blocks are reserved."""

    block_size = BLOCK

    def __init__(self, *running: str) -> None:
        self.running = set(running)
        self.parked: set[str] = set()
        self.out_of_batch: set[str] = set()
        self.reserved: list[Reservation] = []
        self.calls: list[str] = []
        self.fails: dict[str, Exception] = {}
        self.refusal: str | None = None
        self.steps_in_flight = 0
        self.computed_tokens = 40
        self.preemptions = 0
        self.growth = 8
        self.cached_blocks = 0
        self.reserved_blocks = 4
        self.compiling: Future[Any] | None = None
        self.installed: Snapshot | None = None

    def owns(self, request_id: str) -> bool:
        return request_id in self.running | self.parked | self.out_of_batch

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // BLOCK)

    def inspect(self, submission: Submission) -> Standing:
        self._called("inspect")
        self._require(submission)
        return self._standing(submission)

    def park(self, submission: Submission) -> Standing | None:
        self._called("park")
        self._require(submission)
        request_id = submission.request_id
        self.running.discard(request_id)
        self.out_of_batch.add(request_id)
        if self.steps_in_flight:
            self.steps_in_flight -= 1
            return None
        self.out_of_batch.discard(request_id)
        self.parked.add(request_id)
        return self._standing(submission)

    def unpark(self, request_id: str) -> bool:
        """A request that is in the batch stays there."""
        self._called("unpark")
        if self.owns(request_id):
            self.parked.discard(request_id)
            self.out_of_batch.discard(request_id)
            self.running.add(request_id)
        return True

    def drop(self, request_id: str) -> None:
        self._called("drop")
        for requests in (self.running, self.parked, self.out_of_batch):
            requests.discard(request_id)

    def reserve(self, snapshot: Snapshot, tokens: int, keep_free: float) -> Reservation | Refused:
        self._called("reserve")
        if self.refusal is not None:
            return Refused(self.refusal)
        request = SimpleNamespace(request_id=snapshot.submission.request_id)
        blocks = list(range(self.reserved_blocks))
        reservation = Reservation(request, blocks, self.cached_blocks)  # type: ignore[arg-type]
        self.reserved.append(reservation)
        return reservation

    def extend(self, reservation: Reservation, tokens: int, keep_free: float) -> Refused | None:
        self._called("extend")
        assert reservation in self.reserved, "extended what was given back"
        if self.refusal is not None:
            return Refused(self.refusal)
        reservation.block_ids = list(range(self.blocks_for(tokens)))
        return None

    def capacity(self, reservation: Reservation) -> int:
        return len(reservation.block_ids) * BLOCK

    def grammar(self, reservation: Reservation) -> Future[Any] | None:
        self._called("grammar")
        return self.compiling

    def install(self, reservation: Reservation, snapshot: Snapshot) -> None:
        self._called("install")
        assert reservation in self.reserved, "installed what was given back"
        self.reserved.remove(reservation)
        self.installed = snapshot
        self.running.add(reservation.request.request_id)

    def cancel(self, reservation: Reservation) -> None:
        self._called("cancel")
        assert reservation in self.reserved, "given back twice"
        self.reserved.remove(reservation)

    def finish(self, request_id: str) -> None:
        """The engine emitted its last token."""
        self.running.discard(request_id)

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fails:
            raise self.fails[name]

    def _require(self, submission: Submission) -> None:
        if not self.owns(submission.request_id):
            raise UnknownRequest("the request has finished")

    def _standing(self, submission: Submission) -> Standing:
        snapshot = Snapshot(submission, (1, 2, 3), self.computed_tokens, self.preemptions)
        blocks = list(range(100, 100 + self.blocks_for(self.computed_tokens)))
        return Standing(snapshot, blocks, self.growth)


class SourceLinks:
    """The data plane at the source, without data: every block has one byte."""

    def __init__(self) -> None:
        self.sent: list[list[int]] = []
        self._connected: set[str] = set()

    async def warm(self, destination: str, peer: Peer) -> None:
        if destination not in self._connected:
            await peer.connect(f"to {destination}")
            self._connected.add(destination)

    async def send(
        self,
        destination: str,
        peer: Peer,
        block_ids: list[int],
        deliver: Callable[[str], Awaitable[Any]],
    ) -> tuple[int, Any]:
        self.sent.append(block_ids)
        return len(block_ids), await deliver(f"to {destination}")


class DestinationLinks:
    """The data plane at the destination. `copy` holds the copy's thread, which nothing cancels."""

    def __init__(self) -> None:
        self.received: list[list[int]] = []
        self.copy: Hold | None = None
        self.error: Exception | None = None

    def expire(self) -> None:
        """No link is idle."""

    async def receive(self, group: str, block_ids: list[int]) -> int:
        if self.copy is not None:
            await self.copy()
        if self.error is not None:
            raise self.error
        self.received.append(block_ids)
        return len(block_ids)


class PeerFake:
    """A destination that agrees to everything, but for what a test puts in the way of a message.

    `before[message]` happens instead of it, `after[message]` when it was carried out and its answer
    is on the way: an exception is raised, a Hold is waited for.
    """

    def __init__(self, incoming: MigrateIn | None = None, seam: Seam | None = None) -> None:
        self.before: dict[str, Exception | Hold | Silence] = {}
        self.after: dict[str, Exception | Hold | Silence] = {}
        self.calls: list[str] = []
        self._incoming = incoming
        self._seam = seam
        self.answer: Reserved | Refused = Reserved(capacity=4 * BLOCK, cached_blocks=0)
        self.never_commits = True

    async def connect(self, group: str) -> None:
        await self._message("connect", None)

    async def reserve(self, message: Reserve) -> Reserved | Refused:
        return await self._message("reserve", self.answer, message)

    async def extend(self, message: Extend) -> Reserved | Refused:
        return await self._message("extend", self.answer, message)

    async def receive(self, message: Stage) -> int:
        return await self._message("receive", message.count, message)

    async def commit(self, message: Commit) -> None:
        await self._message("commit", None, message)

    async def cancel(self, migration_id: str) -> bool:
        return await self._message("cancel", self.never_commits, migration_id)

    async def abort(self, request_id: str) -> None:
        await self._message("abort", None)
        if self._seam is not None:
            self._seam.drop(request_id)

    async def _message(self, name: str, answer: Any, *args: Any) -> Any:
        self.calls.append(name)
        await self._meet(self.before.get(name))
        if self._incoming is not None and name not in ("connect", "abort"):
            answer = await getattr(self._incoming, name)(*args)
        await self._meet(self.after.get(name))
        return answer

    @staticmethod
    async def _meet(obstacle: Exception | Hold | Silence | None) -> None:
        if isinstance(obstacle, Exception):
            raise obstacle
        if obstacle is not None:
            await obstacle()


class Source:
    """An instance that runs "r1", and a destination that is scripted or real."""

    def __init__(
        self, timeout_s: float = TIMEOUT_S, peer: PeerFake | None = None, max_stages: int = 8
    ) -> None:
        self.seam = Seam("r1")
        self.steps = Steps()
        self.links = SourceLinks()
        self.peer = peer or PeerFake()
        self.owned = owned()
        self.out = MigrateOut(
            "here",
            self.steps,
            self.seam,  # type: ignore[arg-type]
            self.links,  # type: ignore[arg-type]
            lambda _: self.peer,
            timeout_s,
            max_stages,
        )

    def move(self) -> Any:
        return self.out.move(self.owned, "there", "admin")

    async def abort(self) -> None:
        """What the llumlet does."""
        self.owned.aborted = True
        if not self.owned.committing:
            self.seam.drop("r1")
            self.owned.leave(Outcome("aborted"))


class Destination:
    """An instance that takes requests in. `now` is its clock, `owned` what it made its own."""

    def __init__(self, at_once: int = 2, timeout_s: float = TIMEOUT_S) -> None:
        self.seam = Seam()
        self.steps = Steps()
        self.links = DestinationLinks()
        self.owned: dict[str, Owned] = {}
        self.now = 0.0
        self.incoming = MigrateIn(
            self.steps,
            self.seam,  # type: ignore[arg-type]
            self.links,  # type: ignore[arg-type]
            Limits(at_once, timeout_s),
            self._own,
            self._disown,
            lambda: self.now,
        )

    def _own(self, submission: Submission) -> Owned:
        self.owned[submission.request_id] = Owned(submission)
        return self.owned[submission.request_id]

    def _disown(self, owned: Owned) -> None:
        del self.owned[owned.submission.request_id]


def reserve(migration_id: str = "m1", request_id: str = "r1") -> Reserve:
    """From a source of its own for each move: a pair has one at a time."""
    return Reserve(
        migration_id, f"source of {migration_id}", Snapshot(submission(request_id), (1,), 40), 48
    )


def commit(migration_id: str = "m1", request_id: str = "r1") -> Commit:
    """One without blocks: all were sent before."""
    return Commit(migration_id, Snapshot(submission(request_id), (1, 2, 3), 42), None)


def stage(first: int, count: int, migration_id: str = "m1") -> Stage:
    return Stage(migration_id, "g", first, count)
