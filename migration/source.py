"""The source's side: one attempt to move one request, by the ownership rule of design.md §4.

At every instant exactly one instance owns the request, and until COMMIT is acknowledged that is
this one, with the request's blocks intact. Whatever fails before, it goes on here as if nothing
happened.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from migration.engine_seam import EngineSeam, Parked
from migration.links import Links, Transfer
from migration.ownership import Outcome, Owned
from migration.peer import Peer, StepThread
from migration.snapshot import CannotMove, Commit, MigrationRecord, Refused, Reserve, Reserved

Reason = Literal["admin", "balance", "drain"]

SETTLE_TRIES = 3
"""How often a destination that did not answer COMMIT is asked what became of it."""

SETTLE_PAUSE_S = 0.1

logger = logging.getLogger("ray.serve.llumnix")


class _RefusedMove(CannotMove):
    """The destination does not take the request; it was not even parked."""


@dataclass(slots=True)
class _Attempt:
    """What has been done so far, for the record."""

    migration_id: str
    owned: Owned
    source: str
    destination: str
    peer: Peer
    reason: Reason
    stages: int = 0
    blocks: int = 0
    bytes: int = 0
    downtime_s: float = 0.0

    def record(self, outcome: str, detail: str = "") -> MigrationRecord:
        return MigrationRecord(
            request_id=self.owned.submission.request_id,
            source=self.source,
            destination=self.destination,
            reason=self.reason,
            outcome=outcome,
            detail=detail,
            stages=self.stages,
            blocks=self.blocks,
            bytes=self.bytes,
            downtime_ms=round(self.downtime_s * 1e3, 3),
        )


class MigrateOut:
    """Moves requests to other instances."""

    def __init__(
        self,
        me: str,
        steps: StepThread,
        seam: EngineSeam,
        links: Links,
        peer: Callable[[str], Peer],
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._me = me
        self._steps = steps
        self._seam = seam
        self._links = links
        self._peer = peer
        self._timeout_s = timeout_s
        self._clock = clock
        self._ids = itertools.count()

    async def move(self, owned: Owned, destination: str, reason: Reason) -> MigrationRecord:
        """Try once to move `owned`. Never raises: the record says how it went."""
        rid = owned.submission.request_id
        attempt = _Attempt(
            migration_id=f"{self._me}/{next(self._ids)}",
            owned=owned,
            source=self._me,
            destination=destination,
            peer=self._peer(destination),
            reason=reason,
        )
        owned.migrating = True
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._links.warm(destination, attempt.peer)
                reserved = await self._reserve(attempt)
            await self._hand_over(attempt, reserved)
            record = attempt.record("completed")
        except _RefusedMove as error:
            record = attempt.record("refused", str(error))
        except Exception as error:  # whatever the other side raises, the request goes on here
            record = attempt.record("aborted", str(error) or type(error).__name__)
        finally:
            owned.migrating = owned.committing = False
        logger.info(
            "migration of %s from %s to %s (%s): %s %s blocks=%d downtime_ms=%.1f",
            rid, self._me, destination, reason, record.outcome, record.detail,
            record.blocks, record.downtime_ms,
        )  # fmt: skip
        return record

    async def _reserve(self, attempt: _Attempt) -> Reserved:
        submission = attempt.owned.submission
        snapshot = await self._steps.run(partial(self._seam.inspect, submission))
        try:
            answer = await attempt.peer.reserve(Reserve(attempt.migration_id, self._me, snapshot))
        except BaseException:
            await self._cancel(attempt)  # it may hold blocks for us
            raise
        if isinstance(answer, Refused):
            raise _RefusedMove(f"{attempt.destination} refuses: {answer.reason}")
        return answer

    async def _hand_over(self, attempt: _Attempt, reserved: Reserved) -> None:
        """Park, copy, commit; on any failure before COMMIT's answer, cancel and unpark."""
        started = self._clock()
        try:
            async with asyncio.timeout(self._timeout_s):
                parked = await self._park(attempt)
                started = self._clock()
                await self._copy(attempt, parked, reserved)
                self._point_of_no_return(attempt)
        except BaseException:
            await self._give_up(attempt)
            raise
        if not await self._commit(attempt, parked):
            attempt.owned.committing = False
            await self._give_up(attempt)
            if attempt.owned.aborted:
                await self._pass_on_abort(attempt)
            raise CannotMove("the destination did not commit")
        attempt.downtime_s = self._clock() - started
        await self._steps.run(partial(self._seam.drop, attempt.owned.submission.request_id))
        if attempt.owned.aborted:
            await self._pass_on_abort(attempt)
        attempt.owned.leave(Outcome("moved", attempt.destination))

    async def _park(self, attempt: _Attempt) -> Parked:
        submission = attempt.owned.submission
        while True:
            # Under async scheduling tokens may be in flight: they land with the next steps.
            parked = await self._steps.run(partial(self._seam.park, submission))
            if parked is not None:
                return parked

    async def _copy(self, attempt: _Attempt, parked: Parked, reserved: Reserved) -> None:
        if parked.snapshot.computed_tokens > reserved.capacity:
            raise CannotMove("it outgrew the blocks reserved for it")
        attempt.stages = 1
        block_ids = parked.block_ids[reserved.cached_blocks :]
        if block_ids:
            transfer = Transfer(attempt.migration_id, reserved.cached_blocks, block_ids)
            attempt.bytes += await self._links.send(attempt.destination, attempt.peer, transfer)
            attempt.blocks += len(block_ids)

    def _point_of_no_return(self, attempt: _Attempt) -> None:
        """From here on an abort must follow the request to its new owner."""
        if attempt.owned.aborted:
            raise CannotMove("its client went away")
        attempt.owned.committing = True

    async def _commit(self, attempt: _Attempt, parked: Parked) -> bool:
        """Whether the destination owns the request now. An unanswered COMMIT is asked about."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await attempt.peer.commit(Commit(attempt.migration_id, parked.snapshot))
            return True
        except CannotMove as error:
            logger.warning("commit refused by %s: %s", attempt.destination, error)
            return False
        except Exception:
            return await self._settle(attempt)

    async def _settle(self, attempt: _Attempt) -> bool:
        """COMMIT's answer is lost: fence it by a cancel, whose answer says which came first.

        A destination that stays silent is taken for dead. Should it have committed after all, the
        ingress drops its duplicate tokens, and it drops the request that nobody asks it for.
        """
        for _ in range(SETTLE_TRIES):
            # "Lost" may be said of a replica that only cannot be reached: ask that one again too.
            with contextlib.suppress(Exception):
                async with asyncio.timeout(self._timeout_s / SETTLE_TRIES):
                    return not await attempt.peer.cancel(attempt.migration_id)
            await asyncio.sleep(SETTLE_PAUSE_S)
        return False

    async def _give_up(self, attempt: _Attempt) -> None:
        """Go on here: first of all the request, then tell the destination, as far as it listens.

        Unparked by its id: a `park` whose answer nobody waited for may still have happened.
        """
        await self._steps.run(partial(self._seam.unpark, attempt.owned.submission.request_id))
        await self._cancel(attempt)

    async def _cancel(self, attempt: _Attempt) -> None:
        with contextlib.suppress(Exception):  # its lease ends there by itself
            async with asyncio.timeout(self._timeout_s):
                await attempt.peer.cancel(attempt.migration_id)

    async def _pass_on_abort(self, attempt: _Attempt) -> None:
        rid = attempt.owned.submission.request_id
        await self._steps.run(partial(self._seam.drop, rid))
        with contextlib.suppress(Exception):  # nobody is attached there: it drops it by itself
            async with asyncio.timeout(self._timeout_s):
                await attempt.peer.abort(rid)
        attempt.owned.leave(Outcome("aborted"))
