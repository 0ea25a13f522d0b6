"""The llumlet: the part of an instance that owns its requests (Llumnix, OSDI'24, §4.3).

It admits requests, measures virtual usage, chooses which request migrates, and answers the ingress'
open calls. It lives on the replica's event loop; the engine lives on the step thread.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from deployments.drain import Drain
from deployments.engine_loop import EngineDead, EngineLoop
from deployments.messages import Orders, Report
from deployments.policy.load import InstanceLoad
from deployments.policy.pairing import Target
from deployments.survey import Survey
from migration.destination import MigrateIn
from migration.engine_seam import EngineSeam
from migration.ownership import Outcome, Owned
from migration.protocol.messages import Refused, Reserve, Reserved
from migration.protocol.timing import PER_PAIR
from migration.resume import resume
from migration.snapshot import CannotMove, MigrationRecord, Snapshot, Submission, UnknownRequest
from migration.source import MigrateOut, Reason

BACKOFF_S = 1.0
"""After a move that failed, no order to go to the same destination is followed for this time."""

REFUSED_S = 0.1
"""The same for a drain that was refused: its orders were older than its last move, and the next
ones, which know of it, are at hand."""

GRAMMAR_S = 10.0
"""For the grammar of a request that was taken over to be compiled; vLLM's own ones take less."""

logger = logging.getLogger("ray.serve.llumnix")


class Llumlet:
    """Owner of this instance's requests."""

    def __init__(
        self,
        replica_id: str,
        fingerprint: str,
        loop: EngineLoop,
        seam: EngineSeam,
        headroom_tokens: Mapping[str, int],
        max_concurrent: int,
        orphan_s: float,
        on_record: Callable[[Submission, MigrationRecord], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.replica_id = replica_id
        self.owned: dict[str, Owned] = {}
        self.changed = asyncio.Event()
        self.migrations: Counter[str] = Counter()
        self._fingerprint = fingerprint
        self._loop = loop
        self._seam = seam
        self.survey = Survey(replica_id, seam, headroom_tokens)
        self._max_concurrent = max_concurrent
        self._orphan_s = orphan_s
        self._on_record = on_record
        self._clock = clock
        self._arrived: list[str] = []
        self._moves: dict[asyncio.Task[MigrationRecord], str] = {}
        self._choosing = asyncio.Lock()
        self._obey_after: dict[str, float] = {}
        self._drain = Drain(replica_id, clock)
        self._out: MigrateOut
        self.incoming: MigrateIn

    def connect(self, outgoing: MigrateOut, incoming: MigrateIn) -> None:
        """Give it the two sides of migration, which need it in turn."""
        self._out, self.incoming = outgoing, incoming

    @property
    def slots(self) -> int:
        """Moves that may leave this instance at once."""
        return self._max_concurrent

    @property
    def draining(self) -> bool:
        """Whether it takes no requests and hands over those that it has."""
        return self._drain.on

    def drain(self, draining: bool) -> None:
        """Be evacuated by ordinary migration, or take requests again.

        Raises CannotMove where it retires.
        """
        self._drain.turn(draining)
        self._changed()

    def retire(self) -> None:
        """Drain for good: Serve stops this instance."""
        self._drain.for_good(len(self.owned))
        self._changed()

    def fail_all(self, error: BaseException) -> None:
        """The engine died: every open call fails."""
        for owned in list(self.owned.values()):
            if not owned.outcome.done():
                owned.outcome.set_exception(EngineDead(str(error)))

    async def submit(self, submission: Submission, tokens: Sequence[int] = ()) -> Outcome:
        """Run a request; returns when it leaves this instance. Cancelling aborts it.

        With output `tokens` it goes on from these: its instance was lost.
        """
        owned = self.own(submission)
        owned.unattached_since = None
        self._arrived.append(submission.request_id)
        try:
            await self._begin(submission, tokens)
        except asyncio.CancelledError:
            await self.abort(submission.request_id)  # queued behind what was begun
            raise
        except CannotMove as error:
            self.disown(owned)
            return Outcome("refused", detail=str(error))
        except Exception:
            self.disown(owned)
            raise
        if owned.aborted:  # before the engine had it
            await self._loop.run(partial(self._seam.drop, submission.request_id))
        return await self._hold(owned)

    async def _begin(self, submission: Submission, tokens: Sequence[int]) -> None:
        if not tokens:
            await self._loop.run(partial(self._seam.add, submission))
            return
        snapshot = Snapshot(submission, tuple(tokens))
        await resume(self._loop, self._seam, snapshot, GRAMMAR_S)

    async def attach(self, request_id: str) -> Outcome:
        """Wait for a request that moved here; returns when it leaves. Cancelling aborts it."""
        owned = self.owned.get(request_id)
        if owned is None:
            return Outcome("unknown")
        owned.unattached_since = None
        return await self._hold(owned)

    async def abort(self, request_id: str, forwarded: bool = False) -> None:
        """Drop a request; if it is just leaving, the new owner is told.

        `forwarded`: by a former owner. Where an ingress has attached meanwhile, it knows better.
        """
        owned = self.owned.get(request_id)
        if owned is None or owned.aborted or (forwarded and owned.unattached_since is None):
            return
        owned.aborted = True
        if owned.committing:
            return  # the move passes it on
        await self._loop.run(partial(self._seam.drop, request_id))
        owned.leave(Outcome("aborted"))
        self._forget(owned)

    def finished(self, request_ids: Iterable[str]) -> None:
        """The engine emitted the last token of these."""
        for request_id in request_ids:
            if owned := self.owned.get(request_id):
                owned.leave(Outcome("finished"))
                if owned.unattached_since is None:
                    self._forget(owned)
        self.changed.set()

    def own(self, submission: Submission) -> Owned:
        """Make a request this instance's, before its engine gets it."""
        owned = Owned(submission, unattached_since=self._clock())
        self.owned[submission.request_id] = owned
        self.changed.set()
        return owned

    def disown(self, owned: Owned) -> None:
        """Undo `own`: the engine did not get it."""
        owned.leave(Outcome("unknown"))
        self._forget(owned)

    async def migrate_out(
        self, request_id: str, destination: str, reason: Reason
    ) -> MigrationRecord:
        """Move one request. Raises UnknownRequest or CannotMove where it is not even tried."""
        return await asyncio.shield(self._start(request_id, destination, reason))

    def _start(
        self, request_id: str, destination: str, reason: Reason
    ) -> "asyncio.Task[MigrationRecord]":
        owned = self._find(request_id)
        if owned.migrating:
            raise CannotMove("the request is already on the move")
        if destination == self.replica_id:
            raise CannotMove("the request is there already")
        if not self._may_move(destination):
            raise CannotMove(
                f"{self.replica_id} has {len(self._moves)} requests on the move: it may have"
                f" {self._max_concurrent}, and {PER_PAIR} to the same instance"
            )
        owned.migrating = True  # before the task runs: a second call must see it
        move = asyncio.create_task(self._move(owned, destination, reason))
        self._moves[move] = destination
        self.changed.set()
        move.add_done_callback(self._moves.pop)
        return move

    async def reserve(self, message: Reserve) -> Reserved | Refused:
        """PRE-ALLOC for a request that would move here."""
        if self.draining:
            return Refused("it is draining")
        if message.snapshot.submission.fingerprint != self._fingerprint:
            return Refused("it runs another model or engine configuration")
        return await self.incoming.reserve(message)

    def _may_move(self, destination: str) -> bool:
        to_there = sum(other == destination for other in self._moves.values())
        return len(self._moves) < self._max_concurrent and to_there < PER_PAIR

    async def _move(self, owned: Owned, destination: str, reason: Reason) -> MigrationRecord:
        record = await self._out.move(owned, destination, reason)
        self.migrations[record.outcome] += 1
        self._on_record(owned.submission, record)
        self._drain.observe(record)
        if owned.outcome.done() and owned.unattached_since is None:
            self._forget(owned)  # else its ingress has yet to ask where it went
        self.changed.set()
        return record

    async def obey(self, orders: Orders, reason: Reason) -> MigrationRecord | None:
        """Hand one request over to the first of the scheduler's targets that has room for one."""
        async with self._choosing:  # until its move has begun, or it would be chosen twice
            for target in filter(self._may_follow, orders.targets):
                choose = partial(self.survey.choose, self.owned, self.draining, target)
                chosen = await self._loop.run(choose)
                if chosen is not None:
                    break
            else:
                return None
            try:
                move = self._start(chosen, target.replica_id, reason)
            except CannotMove:
                return None
        record = await asyncio.shield(move)
        if record.outcome != "completed" and chosen in self.owned:  # else it ended meanwhile
            late = self.draining and record.outcome == "refused"
            self._back_off(target.replica_id, REFUSED_S if late else BACKOFF_S)
        return record

    def _may_follow(self, target: Target) -> bool:
        backed_off = self._clock() < self._obey_after.get(target.replica_id, 0.0)
        return self._may_move(target.replica_id) and not backed_off

    def _back_off(self, destination: str, seconds: float) -> None:
        now = self._clock()
        waiting = {there: until for there, until in self._obey_after.items() if until > now}
        self._obey_after = {**waiting, destination: now + seconds}

    async def report(self) -> Report:
        """The present load, and what arrived since the last report."""
        arrived, self._arrived = tuple(self._arrived), []
        return Report(await self.load(), arrived, dict(self.migrations))

    async def load(self) -> InstanceLoad:
        """The load as of the next step boundary."""
        load = await self._loop.run(partial(self.survey.load, self.owned, self.draining))
        return replace(
            load,
            migrating_in=len(self.incoming),
            migrating_out=len(self._moves),
            fingerprint=self._fingerprint,
        )

    async def housekeeping(self) -> None:
        """Drop reservations without a source, requests without an ingress, unclaimed outcomes."""
        await self.incoming.expire()
        now = self._clock()
        for owned in list(self.owned.values()):
            since = owned.unattached_since
            if since is not None and now - since > self._orphan_s and not owned.migrating:
                if not owned.outcome.done():
                    logger.warning(
                        "%s: no ingress asks for it, dropped", owned.submission.request_id
                    )
                await self.abort(owned.submission.request_id)
                self._forget(owned)

    async def _hold(self, owned: Owned) -> Outcome:
        try:
            outcome = await asyncio.shield(owned.outcome)
        except asyncio.CancelledError:
            await self.abort(owned.submission.request_id)
            raise
        if not owned.migrating:
            self._forget(owned)
        return outcome

    def _find(self, request_id: str) -> Owned:
        """By its id inside the engines, or else by its public one."""
        owned = self.owned.get(request_id) or next(
            (o for o in self.owned.values() if o.submission.public_id == request_id), None
        )
        if owned is None or owned.outcome.done():
            raise UnknownRequest(f"no request {request_id} runs on {self.replica_id}")
        return owned

    def _forget(self, owned: Owned) -> None:
        if self.owned.get(owned.submission.request_id) is owned:
            del self.owned[owned.submission.request_id]
        self._changed()

    def _changed(self) -> None:
        if not self.owned:
            self._drain.empty()
        self.changed.set()
