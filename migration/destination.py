"""The destination's side: reservations that are real, bounded and leased."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from migration.engine_seam import EngineSeam, Reservation
from migration.links import Links
from migration.ownership import Owned
from migration.peer import StepThread
from migration.snapshot import CannotMove, Commit, Refused, Reserve, Reserved, Submission

T = TypeVar("T")

REMEMBERED = 4096
"""Ended migrations whose end is remembered, so that a late or doubled message finds the truth."""

logger = logging.getLogger("ray.serve.llumnix")


@dataclass(slots=True)
class Limits:
    """Bounds on moves: at once in each direction, seconds for one, freeness that must remain."""

    at_once: int
    timeout_s: float
    keep_free: float


@dataclass(slots=True)
class _Incoming:
    reservation: Reservation
    submission: Submission
    source: str
    expires: float
    receiving: asyncio.Task[int] | None = None


class MigrateIn:
    """Requests on their way in. `own` makes a Submission this instance's; `disown` undoes it."""

    def __init__(
        self,
        steps: StepThread,
        seam: EngineSeam,
        links: Links,
        limits: Limits,
        own: Callable[[Submission], Owned],
        disown: Callable[[Owned], None],
        clock: Callable[[], float],
    ) -> None:
        self._steps = steps
        self._seam = seam
        self._links = links
        self._limits = limits
        self._own = own
        self._disown = disown
        self._clock = clock
        self._incoming: dict[str, _Incoming] = {}
        self._requests: set[str] = set()
        self._commits: dict[str, asyncio.Task[None]] = {}
        self._ended: OrderedDict[str, bool] = OrderedDict()
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._requests)

    async def reserve(self, message: Reserve) -> Reserved | Refused:
        """Hold blocks for the request until commit, cancel or the lease's end."""
        if len(self) >= self._limits.at_once:
            return Refused(f"it takes at most {self._limits.at_once} moves at once")
        request_id = message.snapshot.submission.request_id
        if request_id in self._requests:
            return Refused("an earlier move of this request has not ended here")
        self._requests.add(request_id)
        return await self._uncancelled(self._reserve(message))

    async def _reserve(self, message: Reserve) -> Reserved | Refused:
        request_id = message.snapshot.submission.request_id
        try:
            answer = await self._steps.run(
                partial(self._seam.reserve, message.snapshot, self._limits.keep_free)
            )
        except BaseException as error:
            self._requests.discard(request_id)
            if isinstance(error, CannotMove):
                return Refused(str(error))
            raise
        if isinstance(answer, Refused):
            self._requests.discard(request_id)
            return answer
        if message.migration_id in self._ended:
            await self._steps.run(partial(self._seam.cancel, answer))
            self._requests.discard(request_id)
            return Refused("the move was given up")
        self._incoming[message.migration_id] = _Incoming(
            reservation=answer,
            submission=message.snapshot.submission,
            source=message.source,
            expires=self._clock() + self._limits.timeout_s,
        )
        return Reserved(self._seam.capacity(answer), answer.cached_blocks)

    async def receive(self, migration_id: str, group: str, first: int, count: int) -> int:
        """Fill `count` reserved blocks from the request's block `first` on. Answers the bytes."""
        incoming = self._find(migration_id)
        block_ids = incoming.reservation.block_ids[first : first + count]
        if len(block_ids) != count:
            raise CannotMove(f"only {len(block_ids)} of {count} blocks are reserved")
        # The copy goes on even if the source hangs up: its thread must be done with these blocks
        # before they are given back.
        incoming.receiving = asyncio.create_task(self._links.receive(group, block_ids))
        return await asyncio.shield(incoming.receiving)

    async def commit(self, message: Commit) -> None:
        """Own the request from now on."""
        if self._ended.get(message.migration_id):
            return  # a doubled COMMIT: it is done
        commit = self._commits.get(message.migration_id)
        if commit is None:
            self._find(message.migration_id)
            commit = self._task(self._commit(message))
            self._commits[message.migration_id] = commit
            commit.add_done_callback(lambda _: self._commits.pop(message.migration_id))
        await asyncio.shield(commit)

    async def _commit(self, message: Commit) -> None:
        incoming = self._find(message.migration_id)
        grammar = await self._steps.run(partial(self._seam.grammar, incoming.reservation))
        if grammar is not None:
            timeout_s = self._limits.timeout_s / 2
            await asyncio.wait([asyncio.wrap_future(grammar)], timeout=timeout_s)
            if not grammar.done():
                raise CannotMove("its grammar is still being compiled")
        if self._incoming.pop(message.migration_id, None) is None:
            raise CannotMove("the move was given up")
        owned = self._own(incoming.submission)  # before it can finish here
        try:
            await self._steps.run(
                partial(self._seam.install, incoming.reservation, message.snapshot)
            )
        except Exception as error:
            self._disown(owned)
            self._remember(message.migration_id, committed=False)
            await self._free(incoming)
            raise CannotMove(f"the destination could not take it over: {error}") from None
        self._requests.discard(incoming.submission.request_id)
        self._remember(message.migration_id, committed=True)

    async def cancel(self, migration_id: str) -> bool:
        """Give the blocks back. True if this migration will never commit, False if it has."""
        if migration_id not in self._incoming and (commit := self._commits.get(migration_id)):
            await asyncio.wait([commit])  # it is being installed: nothing stops that any more
        if self._ended.get(migration_id):
            return False
        self._remember(migration_id, committed=False)
        if incoming := self._incoming.pop(migration_id, None):
            await self._uncancelled(self._free(incoming))
        return True

    async def expire(self) -> None:
        """Cancel what its source forgot: it died, or its messages are lost."""
        now = self._clock()
        for migration_id, incoming in list(self._incoming.items()):
            if incoming.expires < now:
                logger.warning(
                    "migration %s from %s: no word, reservation dropped",
                    migration_id,
                    incoming.source,
                )
                await self.cancel(migration_id)

    async def _free(self, incoming: _Incoming) -> None:
        if incoming.receiving is not None:
            await asyncio.wait([incoming.receiving])
        await self._steps.run(partial(self._seam.cancel, incoming.reservation))
        self._requests.discard(incoming.submission.request_id)

    def _task(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _uncancelled(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """To its end, whatever becomes of the caller: over gRPC its timeout cancels us."""
        return await asyncio.shield(self._task(coroutine))

    def _find(self, migration_id: str) -> _Incoming:
        incoming = self._incoming.get(migration_id)
        if incoming is None:
            raise CannotMove("the destination knows nothing of this move (any more)")
        return incoming

    def _remember(self, migration_id: str, *, committed: bool) -> None:
        self._ended[migration_id] = committed
        while len(self._ended) > REMEMBERED:
            self._ended.popitem(last=False)
