"""Moves away from this instance: those under way, and the scheduler's orders for more."""

import asyncio
from collections.abc import Callable, Mapping
from functools import partial

from deployments.engine_loop import EngineLoop
from deployments.messages import Orders
from deployments.policy.pairing import Target
from deployments.survey import Survey
from migration.ownership import Owned
from migration.protocol.timing import PER_PAIR
from migration.snapshot import CannotMove, MigrationRecord
from migration.source import MigrateOut, Reason

BACKOFF_S = 1.0
"""After a move that failed, no order to go to the same destination is followed for this time."""

REFUSED_S = 0.1
"""The same for a drain that was refused: its orders were older than its last move, and the next
ones, which know of it, are at hand."""

Move = asyncio.Task[MigrationRecord]


class Departures:
    """At most `most` moves at a time, and of these PER_PAIR to one destination.

    `owned`: the llumlet's requests, by id. `changed` is set when one sets out, `ended` is told of
    its end.
    """

    def __init__(
        self,
        replica_id: str,
        loop: EngineLoop,
        survey: Survey,
        owned: Mapping[str, Owned],
        draining: Callable[[], bool],
        most: int,
        changed: asyncio.Event,
        ended: Callable[[Owned, MigrationRecord], None],
        clock: Callable[[], float],
    ) -> None:
        self._out: MigrateOut
        self._replica_id = replica_id
        self._loop = loop
        self._survey = survey
        self._owned = owned
        self._draining = draining
        self.most = most
        self._changed = changed
        self._ended = ended
        self._clock = clock
        self._moves: dict[Move, str] = {}
        self._choosing = asyncio.Lock()
        self._obey_after: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._moves)

    def connect(self, out: MigrateOut) -> None:
        """Give it the side of migration that makes the moves."""
        self._out = out

    def start(self, owned: Owned, destination: str, reason: Reason) -> Move:
        """Begin to move a request. Raises CannotMove where it is not even tried."""
        if owned.migrating:
            raise CannotMove("the request is already on the move")
        if destination == self._replica_id:
            raise CannotMove("the request is there already")
        if not self._may_move(destination):
            raise CannotMove(
                f"{self._replica_id} has {len(self)} requests on the move: it may have"
                f" {self.most}, and {PER_PAIR} to the same instance"
            )
        owned.migrating = True  # before the task runs: a second call must see it
        move = asyncio.create_task(self._move(owned, destination, reason))
        self._moves[move] = destination
        self._changed.set()
        move.add_done_callback(self._moves.pop)
        return move

    async def obey(self, orders: Orders, reason: Reason) -> MigrationRecord | None:
        """Hand one request over to the first of the scheduler's targets that has room for one."""
        async with self._choosing:  # until its move has begun, or it would be chosen twice
            for target in filter(self._may_follow, orders.targets):
                choose = partial(self._survey.choose, self._owned, self._draining(), target)
                chosen = await self._loop.run(choose)
                owned = self._owned.get(chosen) if chosen is not None else None
                if owned is not None and not owned.outcome.done():
                    break
            else:
                return None
            try:
                move = self.start(owned, target.replica_id, reason)
            except CannotMove:
                return None
        record = await asyncio.shield(move)
        if record.outcome != "completed" and chosen in self._owned:  # else it ended meanwhile
            late = self._draining() and record.outcome == "refused"
            self._back_off(target.replica_id, REFUSED_S if late else BACKOFF_S)
        return record

    async def _move(self, owned: Owned, destination: str, reason: Reason) -> MigrationRecord:
        record = await self._out.move(owned, destination, reason)
        self._ended(owned, record)
        return record

    def _may_move(self, destination: str) -> bool:
        to_there = sum(other == destination for other in self._moves.values())
        return len(self) < self.most and to_there < PER_PAIR

    def _may_follow(self, target: Target) -> bool:
        backed_off = self._clock() < self._obey_after.get(target.replica_id, 0.0)
        return self._may_move(target.replica_id) and not backed_off

    def _back_off(self, destination: str, seconds: float) -> None:
        now = self._clock()
        waiting = {there: until for there, until in self._obey_after.items() if until > now}
        self._obey_after = {**waiting, destination: now + seconds}
