"""Takes requests in: carries out what `migration.protocol.destination` allows.

Reservations are real, bounded and leased; messages may come late, twice, or never.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from migration.engine_seam import EngineSeam, Reservation
from migration.links import Links
from migration.ownership import Owned
from migration.peer import StepThread
from migration.protocol.destination import Event, State, after
from migration.protocol.messages import Commit, Extend, Refused, Reserve, Reserved, Stage
from migration.protocol.timing import PER_PAIR, REMEMBERED
from migration.resume import compiled
from migration.snapshot import CannotMove, Submission

T = TypeVar("T")

logger = logging.getLogger("ray.serve.llumnix")


@dataclass(slots=True)
class Limits:
    """Bounds on moves: at once in each direction, seconds for one, freeness that must remain.

    With one step left for each request nobody is preempted for one that moves in. The scheduler,
    whose view is older, leaves more; a drain or a move by hand may use all of it.
    """

    at_once: int
    timeout_s: float
    keep_free: float = 1.0


@dataclass(slots=True, eq=False)
class _Move:
    """One request on its way in."""

    migration_id: str
    source: str
    submission: Submission
    expires: float
    state: State = State.RESERVING
    reservation: Reservation | None = None
    reserving: asyncio.Task[Reserved | Refused] | None = None
    stages: dict[int, asyncio.Task[int]] = field(default_factory=dict)
    committing: asyncio.Task[None] | None = None

    @property
    def copying(self) -> bool:
        return any(not task.done() for task in self.stages.values())

    def on(self, event: Event) -> None:
        self.state = after(self.state, event)


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
        self._moves: dict[str, _Move] = {}
        self._ended: OrderedDict[str, bool] = OrderedDict()
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._moves)

    async def reserve(self, message: Reserve) -> Reserved | Refused:
        """Hold blocks for the request until commit, cancel or the lease's end."""
        move = self._moves.get(message.migration_id)
        if move is None:
            if refused := self._refusal(message):
                return refused
            submission = message.snapshot.submission
            move = _Move(message.migration_id, message.source, submission, self._lease())
            self._moves[message.migration_id] = move
            move.reserving = self._task(self._reserve(move, message))
        assert move.reserving is not None
        return await asyncio.shield(move.reserving)

    def _refusal(self, message: Reserve) -> Refused | None:
        if message.migration_id in self._ended:
            return Refused("the move was given up")
        if len(self) >= self._limits.at_once:
            return Refused(f"it takes at most {self._limits.at_once} moves at once")
        moves = self._moves.values()
        if sum(move.source == message.source for move in moves) >= PER_PAIR:
            return Refused("another request is on its way from there")
        request_id = message.snapshot.submission.request_id
        if any(move.submission.request_id == request_id for move in moves):
            return Refused("an earlier move of this request has not ended here")
        return None

    async def _reserve(self, move: _Move, message: Reserve) -> Reserved | Refused:
        """Its grammar is compiled meanwhile, so that COMMIT need not wait for it."""
        try:
            answer = await self._steps.run(
                partial(
                    self._seam.reserve, message.snapshot, message.tokens, self._limits.keep_free
                )
            )
            if isinstance(answer, Reservation):
                move.reservation = answer
                if not await compiled(self._steps, self._seam, answer, self._limits.timeout_s / 2):
                    answer = Refused("its grammar is still being compiled there")
        except CannotMove as error:
            answer = Refused(str(error))
        except BaseException:
            await self._end(move, committed=False)
            raise
        if move.state is State.GIVEN_UP:
            answer = Refused("the move was given up")
        if isinstance(answer, Refused):
            if move.state is State.RESERVING:
                move.on(Event.REFUSED)
            await self._end(move, committed=False)
            return answer
        move.on(Event.GRANTED)
        move.expires = self._lease()
        return Reserved(self._seam.capacity(answer), answer.cached_blocks)

    async def extend(self, message: Extend) -> Reserved | Refused:
        """Hold more blocks for it."""
        move = self._stage(message.migration_id)
        assert move.reservation is not None
        refused = await self._steps.run(
            partial(self._seam.extend, move.reservation, message.tokens, self._limits.keep_free)
        )
        if refused is not None:
            return refused
        return Reserved(self._seam.capacity(move.reservation), move.reservation.cached_blocks)

    async def receive(self, message: Stage) -> int:
        """Fill the reserved blocks of a stage. Answers the bytes."""
        move = self._stage(message.migration_id)
        return await self._receive(move, message)

    async def _receive(self, move: _Move, stage: Stage) -> int:
        receiving = move.stages.get(stage.first)
        if receiving is None:
            assert move.reservation is not None
            block_ids = move.reservation.block_ids[stage.first : stage.first + stage.count]
            if len(block_ids) != stage.count:
                raise CannotMove(f"only {len(block_ids)} of {stage.count} blocks are reserved")
            receiving = self._task(self._links.receive(stage.group, block_ids))
            move.stages[stage.first] = receiving
        # The copy goes on even if the source hangs up: its thread must be done with these blocks
        # before they are given back.
        try:
            received = await asyncio.shield(receiving)
        except Exception as error:
            raise CannotMove(f"the copy broke: {error}") from None
        move.expires = self._lease()
        return received

    async def commit(self, message: Commit) -> None:
        """Own the request from now on, once its last bytes are here."""
        if self._ended.get(message.migration_id):
            return  # a doubled COMMIT: it is done
        move = self._find(message.migration_id)
        if move.committing is None:
            move.on(Event.COMMIT)
            move.committing = self._task(self._commit(move, message))
        await asyncio.shield(move.committing)

    async def _commit(self, move: _Move, message: Commit) -> None:
        try:
            if message.last is not None:
                await self._receive(move, message.last)
            move.on(Event.FILLED)
        except Exception as error:
            raise await self._not_committed(move, error) from None
        assert move.reservation is not None
        owned = self._own(move.submission)  # before it can finish here
        try:
            await self._steps.run(partial(self._seam.install, move.reservation, message.snapshot))
        except Exception as error:
            self._disown(owned)
            raise await self._not_committed(move, error) from None
        move.on(Event.INSTALLED)
        await self._end(move, committed=True)

    async def _not_committed(self, move: _Move, error: Exception) -> CannotMove:
        if move.state is not State.GIVEN_UP:
            move.on(Event.FAILED)
            await self._end(move, committed=False)
        return CannotMove(f"the destination could not take it over: {error}")

    async def cancel(self, migration_id: str) -> bool:
        """Give the blocks back. True if this migration will never commit, False if it has."""
        move = self._moves.get(migration_id)
        if move is not None and move.state is State.INSTALLING and move.committing:
            await asyncio.wait([move.committing])
        if self._ended.get(migration_id):
            return False
        self._remember(migration_id, committed=False)
        if move is not None and move.state is not State.GIVEN_UP:
            reserving = move.state is State.RESERVING
            move.on(Event.CANCEL)
            if not reserving:  # else the reservation is given back by who makes it
                ending = self._task(self._end(move, committed=False))
                if not move.copying:  # which may hang, while the answer is known already
                    await asyncio.shield(ending)
        return True

    async def expire(self) -> None:
        """Cancel what its source forgot: it died, or its messages are lost; and so with links."""
        self._links.expire()
        now = self._clock()
        for move in list(self._moves.values()):
            if move.state is State.HELD and move.expires < now and not move.copying:
                logger.warning(
                    "migration %s from %s: no word, reservation dropped",
                    move.migration_id,
                    move.source,
                )
                await self.cancel(move.migration_id)

    async def _end(self, move: _Move, *, committed: bool) -> None:
        self._remember(move.migration_id, committed=committed)
        if not committed:
            if move.stages:
                await asyncio.wait(move.stages.values())
            if move.reservation is not None:
                await self._steps.run(partial(self._seam.cancel, move.reservation))
        self._moves.pop(move.migration_id, None)

    def _stage(self, migration_id: str) -> _Move:
        move = self._find(migration_id)
        move.on(Event.STAGE)
        move.expires = self._lease()
        return move

    def _find(self, migration_id: str) -> _Move:
        move = self._moves.get(migration_id)
        if move is None:
            raise CannotMove("the destination knows nothing of this move (any more)")
        return move

    def _lease(self) -> float:
        return self._clock() + self._limits.timeout_s

    def _task(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """To its end, whatever becomes of the caller: over gRPC its timeout cancels us."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever asked may have hung up

    def _remember(self, migration_id: str, *, committed: bool) -> None:
        self._ended[migration_id] = committed
        while len(self._ended) > REMEMBERED:
            self._ended.popitem(last=False)
