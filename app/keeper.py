"""Keeper: sees to it that each request has an owner, until it has ended.

One call stays open to the replica that has the request, wherever it moves. Where that replica is
lost, the request is submitted again with the tokens that the journal has (design.md §1, "one resume
path"), and goes on elsewhere.
"""

import asyncio
import logging
import time
from contextlib import suppress
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Counter

from app.config import RecoveryConfig
from app.entry import Entry
from app.journal import Journal
from app.tasks import Tasks
from app.vitals import Vitals
from deployments.consult import NoInstance
from deployments.engine_loop import EngineDead
from deployments.messages import Route
from deployments.pinned import ReplicaGone, call, pinned
from migration.ownership import Outcome

GAP_S = 5.0
"""A token missing for this long is lost."""

ABORT_S = 5.0

PLACE_S = 30.0
"""A new request that no instance has owned for this long is refused; one that owns it says so
between two of its steps."""

RETRY_PAUSE_S, LONGEST_PAUSE_S = 0.1, 1.0
"""Before a request is sent out again that no replica had, at first and at most: all that Serve's
routers know may be dead, until the controller notices."""

logger = logging.getLogger("ray.serve.llumnix")


class Lost(Exception):
    """A request is lost where it was. `dead`: the replica, where all that it had is lost."""

    def __init__(self, why: str, dead: str | None = None) -> None:
        super().__init__(why)
        self.dead = dead


class GaveUp(Exception):
    """A request cannot go on; the message says why, for the user."""


class Keeper:
    """`recoveries`: how often a lost request has found a new owner."""

    def __init__(
        self,
        replicas: DeploymentHandle,
        journal: Journal,
        vitals: Vitals,
        settings: RecoveryConfig,
        tasks: Tasks,
    ) -> None:
        self.recoveries = 0
        self._replicas = replicas
        self._tasks = tasks
        self._journal = journal
        self._vitals = vitals
        self._settings = settings
        self._counter = Counter(
            "llumnix_recoveries_total", "Requests whose instance was lost.", ("outcome",)
        )

    async def keep(self, entry: Entry) -> None:
        """Run a request to its end. Raises GaveUp or NoInstance where it does not get there."""
        try:
            while not entry.ended:
                try:
                    await self._run(entry)
                except Lost as loss:
                    if not entry.ended:
                        await self._again(entry, loss)
        except (GaveUp, NoInstance):
            if entry.lost_at is not None:
                self._counter.inc(1, {"outcome": "failed"})
            raise

    def owned(self, entry: Entry, replica_id: str, first: int) -> None:
        """A replica says that it has the request, from token `first` on."""
        taken_over = entry.unplaced_since is not None and entry.lost_at is not None
        if not entry.owned_by(replica_id, first):
            self.overheard(entry, replica_id)
        elif taken_over:
            self._taken_over(entry, replica_id)

    def overheard(self, entry: Entry, replica_id: str) -> None:
        """A replica speaks of a request that another one owns."""
        if replica_id not in entry.strangers:
            entry.strangers.add(replica_id)
            self.disown(replica_id, entry.submission.request_id)

    def disown(self, replica_id: str, request_id: str) -> None:
        """Tell a replica that nobody wants the request from there (any more)."""
        self._tasks.start(self._abort(replica_id, request_id))

    def _taken_over(self, entry: Entry, replica_id: str) -> None:
        self.recoveries += 1
        entry.recoveries += 1
        self._counter.inc(1, {"outcome": "resumed"})
        logger.info(
            "request %s goes on at %s from token %d on, %.2f s after %s (%d of %d)",
            entry.submission.public_id, replica_id, entry.output_tokens,
            time.monotonic() - (entry.lost_at or 0.0), entry.loss,
            entry.recoveries, self._settings.max_recoveries,
        )  # fmt: skip

    def drop(self, entry: Entry, why: Exception) -> None:
        """Take a request away from where it is, for `keep` to go on after `why`."""
        if entry.open is not None and not entry.open.done():
            entry.dropped = why
            entry.open.cancel()  # over gRPC this reaches the replica, once that is awake

    def look_after(self, now: float) -> None:
        """To be called now and then: nothing waits for ever, nor for an instance that hangs."""
        live = self._journal.live()
        places = {place for entry in live for place in (entry.place, entry.asked) if place}
        for each in self._vitals.watch(places, now):
            logger.warning("%s hangs: it has said nothing for %.0f s", each, self._settings.hang_s)
        gone = self._vitals.gone(now)
        for entry in live:
            if why := self._overdue(entry, now) or self._in_danger(entry, gone, now):
                self.drop(entry, why)

    def _overdue(self, entry: Entry, now: float) -> Exception | None:
        if entry.gap_since is not None and now - entry.gap_since > GAP_S:
            return Lost("a token got lost on its way")
        waited = entry.waited(now)
        if entry.lost_at is None:
            return NoInstance(f"none did for {PLACE_S:.0f} s") if waited > PLACE_S else None
        limit = self._settings.wait_s
        return GaveUp(f"no instance took it over within {limit:.0f} s") if waited > limit else None

    def _in_danger(self, entry: Entry, gone: set[str], now: float) -> Lost | None:
        """Its instance hangs, or so it seems: what could not go on elsewhere stays. Where there is
        no other it will be sent there again, so it is given time.
        """
        here = gone.intersection((entry.place, entry.asked))
        may_leave = entry.resumable and entry.recoveries < self._settings.max_recoveries
        if not here or not may_leave or now - entry.sent_at < self._settings.hang_s:
            return None
        return Lost(f"its instance {here.pop()} hung")

    # --- one owner after the other -----------------------------------------------------------

    async def _run(self, entry: Entry) -> None:
        """From owner to owner as it moves. Raises Lost, GaveUp or NoInstance."""
        entry.sent_at, entry.attached = time.monotonic(), None
        arguments = entry.submission, entry.route, entry.tokens
        outcome = await self._left(entry, self._replicas, "submit", *arguments)
        while outcome.kind == "moved" and outcome.destination and not entry.ended:
            entry.attached = outcome.destination
            owner = pinned(self._replicas, outcome.destination)
            outcome = await self._left(entry, owner, "attach", entry.submission.request_id)
        if entry.ended:
            return
        if outcome.kind == "refused":
            raise GaveUp(f"it cannot go on elsewhere: {outcome.detail}")
        with suppress(TimeoutError):
            async with asyncio.timeout(GAP_S):
                await entry.over.wait()  # its last tokens may still be on their way
        if not entry.ended:
            raise Lost("its last token got lost on its way")

    async def _left(
        self, entry: Entry, handle: DeploymentHandle, method: str, *arguments: Any
    ) -> Outcome:
        """Call a replica, and hear how the request left it. Raises `drop`'s error, Lost, NoInstance
        or GaveUp.
        """
        owners = max(1, len(entry.owners))  # the first one is who is called: it says so itself
        entry.dropped = None
        try:
            entry.open = asyncio.ensure_future(call(handle, method, *arguments))
            outcome: Outcome = await entry.open
            if outcome.kind == "moved" or not self._is_void(entry, outcome, owners):
                return outcome
            error: Exception = Lost(f"it was {outcome.kind} at {entry.asked}")
        except asyncio.CancelledError as cancelled:
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            error = entry.dropped or self._told(entry, cancelled)
        except Exception as raised:  # over gRPC a dead engine's error arrives as it was raised
            error = self._told(entry, raised)
        if len(entry.owners) > owners and isinstance(error, Lost):
            if error.dead is not None:
                self._vitals.lost(error.dead, time.monotonic())
            return Outcome("moved", entry.place)  # the new owner said so, the old one cannot
        raise error from None

    def _is_void(self, entry: Entry, outcome: Outcome, owners: int) -> bool:
        """Whether it did not end with this: nobody wanted it to, or another one had it by then."""
        former = len(entry.owners) > owners and entry.place != entry.asked
        return former or outcome.kind in ("aborted", "unknown")

    def _told(self, entry: Entry, error: BaseException) -> Exception:
        """What an open call's error means."""
        if isinstance(error, NoInstance):  # others may be starting
            return error if entry.lost_at is None else Lost(str(error))
        if isinstance(error, RayActorError | ReplicaGone | EngineDead):
            why = f"its instance {entry.asked} was lost ({type(error).__name__})"
            return Lost(why, dead=entry.asked)
        why = f"its instance {entry.asked} failed on it ({type(error).__name__})"
        # One that refused it before it had it would not be the only one to do so.
        return GaveUp(why) if entry.unplaced_since is not None else Lost(why)

    async def _again(self, entry: Entry, loss: Lost) -> None:
        """Make a lost request ready to be submitted again. Raises GaveUp or NoInstance."""
        now, place = time.monotonic(), entry.place
        had_it = entry.unplaced_since is None
        if had_it:
            entry.unplaced_since, entry.loss = now, str(loss)
            entry.lost_at = entry.lost_at or now
        if loss.dead is not None:
            self._vitals.lost(loss.dead, now)
        if place is not None and place != loss.dead:
            self.disown(place, entry.submission.request_id)
        self._journal.renew(entry)
        if had_it:
            self._check(entry, str(loss))
        elif late := self._overdue(entry, now):
            raise late
        else:
            retries = min(entry.submissions - 2, 10)  # so far; soon the pause is the longest
            await asyncio.sleep(min(RETRY_PAUSE_S * 2**retries, LONGEST_PAUSE_S))
        entry.route = Route(self._vitals.avoid(time.monotonic()))

    def _check(self, entry: Entry, why: str) -> None:
        """Raise GaveUp unless a lost request may go on."""
        most = self._settings.max_recoveries
        if entry.recoveries >= most:
            often = f", after {most} recoveries (recovery.max_recoveries)" if most else ""
            raise GaveUp(f"{why}{often}")
        if not entry.submission.request:
            raise GaveUp(f"{why}, and the journal had no room for it (recovery.max_journal_tokens)")

    async def _abort(self, replica_id: str, request_id: str) -> None:
        with suppress(Exception):  # whatever it is, nobody waits for it: both are gone
            async with asyncio.timeout(ABORT_S):
                await call(pinned(self._replicas, replica_id), "abort", request_id)
