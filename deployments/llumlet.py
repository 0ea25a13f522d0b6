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

from deployments.departures import Departures
from deployments.drain import Drain
from deployments.engine_loop import EngineDead, EngineLoop
from deployments.messages import Orders, Report
from deployments.policy.load import InstanceLoad
from deployments.survey import Survey
from migration.destination import MigrateIn
from migration.engine_seam import EngineSeam
from migration.ownership import Outcome, Owned
from migration.protocol.messages import Refused, Reserve, Reserved
from migration.resume import resume
from migration.snapshot import CannotMove, MigrationRecord, Snapshot, Submission, UnknownRequest
from migration.source import MigrateOut, Reason

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
        self._orphan_s = orphan_s
        self._on_record = on_record
        self._clock = clock
        self._arrived: list[str] = []
        self._drain = Drain(replica_id, clock)
        self._departures = Departures(
            replica_id,
            loop,
            self.survey,
            owned=self.owned,
            draining=lambda: self.draining,
            most=max_concurrent,
            changed=self.changed,
            ended=self._left,
            clock=clock,
        )
        self.incoming: MigrateIn

    def connect(self, outgoing: MigrateOut, incoming: MigrateIn) -> None:
        """Give it the two sides of migration, which need it in turn."""
        self._departures.connect(outgoing)
        self.incoming = incoming

    @property
    def slots(self) -> int:
        """Moves that may leave this instance at once."""
        return self._departures.most

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
        owned = self._find(request_id)
        return await asyncio.shield(self._departures.start(owned, destination, reason))

    async def reserve(self, message: Reserve) -> Reserved | Refused:
        """PRE-ALLOC for a request that would move here."""
        if self.draining:
            return Refused("it is draining")
        if message.snapshot.submission.fingerprint != self._fingerprint:
            return Refused("it runs another model or engine configuration")
        return await self.incoming.reserve(message)

    def _left(self, owned: Owned, record: MigrationRecord) -> None:
        """A move of one of them has ended."""
        self.migrations[record.outcome] += 1
        self._on_record(owned.submission, record)
        self._drain.observe(record)
        if owned.outcome.done() and owned.unattached_since is None:
            self._forget(owned)  # else its ingress has yet to ask where it went
        self.changed.set()

    async def obey(self, orders: Orders, reason: Reason) -> MigrationRecord | None:
        """Hand one request over as the scheduler says, if there is one to."""
        return await self._departures.obey(orders, reason)

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
            migrating_out=len(self._departures),
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
