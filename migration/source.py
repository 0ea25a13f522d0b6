"""Moves requests out: carries out what `migration.protocol.source` says, one attempt at a time."""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

from migration.engine_seam import EngineSeam
from migration.links import Links
from migration.ownership import Outcome, Owned
from migration.peer import Peer, StepThread
from migration.protocol import source as protocol
from migration.protocol.messages import Commit, Extend, Refused, Reserve, Reserved, Stage
from migration.protocol.timing import SETTLE_PAUSE_S, SETTLE_TRIES
from migration.snapshot import CannotMove, MigrationRecord, Submission

T = TypeVar("T")
Reason = Literal["admin", "balance", "drain"]

logger = logging.getLogger("ray.serve.llumnix")


@dataclass(slots=True)
class _Attempt:
    """One move under way: what the machine does not know."""

    migration_id: str
    owned: Owned
    destination: str
    peer: Peer
    block_ids: list[int] = field(default_factory=list)
    blocks: int = 0
    bytes: int = 0
    parked_at: float = 0.0
    downtime_s: float = 0.0

    @property
    def submission(self) -> Submission:
        return self.owned.submission


class MigrateOut:
    """Moves requests to other instances. `timeout_s` bounds each wait for the other side."""

    def __init__(
        self,
        me: str,
        steps: StepThread,
        seam: EngineSeam,
        links: Links,
        peer: Callable[[str], Peer],
        timeout_s: float,
        max_stages: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._me = me
        self._steps = steps
        self._seam = seam
        self._links = links
        self._peer = peer
        self._timeout_s = timeout_s
        self._max_stages = max_stages
        self._clock = clock
        self._ids = itertools.count()

    async def move(self, owned: Owned, destination: str, reason: Reason) -> MigrationRecord:
        """Try once to move `owned`. Never raises: the record says how it went."""
        attempt = _Attempt(
            f"{self._me}/{next(self._ids)}", owned, destination, self._peer(destination)
        )
        machine = protocol.Source(self._seam.block_size, self._max_stages)
        owned.migrating = True
        try:
            end = await self._run(machine, attempt)
        finally:
            owned.migrating = owned.committing = False
        record = MigrationRecord(
            request_id=attempt.submission.request_id,
            source=self._me,
            destination=destination,
            reason=reason,
            outcome=end.outcome,
            detail=end.detail,
            stages=machine.stages,
            blocks=attempt.blocks,
            bytes=attempt.bytes,
            downtime_ms=round(attempt.downtime_s * 1e3, 3),
            recomputed_tokens=machine.recomputed_tokens,
        )
        logger.info(
            "migration of %s from %s to %s (%s): %s %s stages=%d blocks=%d downtime_ms=%.1f",
            record.request_id, self._me, destination, reason, record.outcome, record.detail,
            record.stages, record.blocks, record.downtime_ms,
        )  # fmt: skip
        return record

    async def _run(self, machine: protocol.Source, attempt: _Attempt) -> protocol.End:
        action = machine.start()
        while not isinstance(action, protocol.End):
            event = await self._outcome_of(action, attempt)
            # No await from here to the next action: an abort comes before or after, not between.
            machine.client_gone = attempt.owned.aborted
            action = machine.on(event)
            attempt.owned.committing = machine.committing
        return action

    async def _outcome_of(self, action: protocol.Action, attempt: _Attempt) -> protocol.Event:
        try:
            return await self._perform(action, attempt)
        except Exception as error:  # whatever the other side raises, the request goes on somewhere
            if isinstance(action, protocol.SendCommit) and not isinstance(error, CannotMove):
                return protocol.Silence()
            return protocol.Failed(str(error) or type(error).__name__)

    async def _perform(self, action: protocol.Action, attempt: _Attempt) -> protocol.Event:
        peer = attempt.peer
        match action:
            case protocol.Connect():
                await self._in_time(self._links.warm(attempt.destination, peer))
            case protocol.Inspect():
                return await self._in_time(self._inspect(attempt))
            case protocol.AskReserve(snapshot, tokens):
                reserve = Reserve(attempt.migration_id, self._me, snapshot, tokens)
                return await self._granted(attempt, peer.reserve(reserve))
            case protocol.AskExtend(tokens):
                extend = Extend(attempt.migration_id, tokens)
                return await self._granted(attempt, peer.extend(extend))
            case protocol.Copy(first, count):
                await self._in_time(self._copy(attempt, first, count))
            case protocol.Park():
                return await self._in_time(self._park(attempt))
            case protocol.SendCommit():
                return await self._in_time(self._commit(attempt, action))
            case protocol.Settle():
                return await self._settle(attempt)
            case protocol.Unpark():
                unpark = partial(self._seam.unpark, attempt.submission.request_id)
                while not await self._steps.run(unpark):
                    pass  # as in `_park`
            case protocol.Cancel():
                await self._in_time(peer.cancel(attempt.migration_id))
            case protocol.Release():
                # First of all the ingress: the new owner waits for it to attach, but not for ever.
                if not attempt.owned.aborted:
                    attempt.owned.leave(Outcome("moved", attempt.destination))
                await self._steps.run(partial(self._seam.drop, attempt.submission.request_id))
            case protocol.ForwardAbort():
                await self._forward_abort(attempt)
        return protocol.Done()

    async def _in_time(self, waiting: Coroutine[Any, Any, T]) -> T:
        async with asyncio.timeout(self._timeout_s):
            return await waiting

    async def _granted(
        self, attempt: _Attempt, asking: Coroutine[Any, Any, Reserved | Refused]
    ) -> protocol.Event:
        answer = await self._in_time(asking)
        if isinstance(answer, Refused):
            return Refused(f"{attempt.destination} refuses: {answer.reason}")
        return answer

    async def _inspect(self, attempt: _Attempt) -> protocol.Inspected:
        standing = await self._steps.run(partial(self._seam.inspect, attempt.submission))
        attempt.block_ids = standing.block_ids
        return protocol.Inspected(standing.snapshot, standing.growth)

    async def _copy(self, attempt: _Attempt, first: int, count: int) -> None:
        def deliver(group: str) -> Awaitable[int]:
            return attempt.peer.receive(Stage(attempt.migration_id, group, first, count))

        block_ids = attempt.block_ids[first : first + count]
        sent, received = await self._links.send(
            attempt.destination, attempt.peer, block_ids, deliver
        )
        if sent != received:
            raise ConnectionError(f"sent {sent} bytes, {received} arrived")
        attempt.blocks += count
        attempt.bytes += sent

    async def _park(self, attempt: _Attempt) -> protocol.Parked:
        while True:
            # Under async scheduling tokens may be in flight: they land with the next steps.
            standing = await self._steps.run(partial(self._seam.park, attempt.submission))
            if standing is not None:
                attempt.parked_at = self._clock()
                attempt.block_ids = standing.block_ids
                return protocol.Parked(standing.snapshot)

    async def _commit(self, attempt: _Attempt, action: protocol.SendCommit) -> protocol.Event:
        """COMMIT goes along with the last blocks: one round trip while the request stands still."""
        used = self._seam.blocks_for(action.snapshot.computed_tokens)
        block_ids = attempt.block_ids[action.first : used]

        def deliver(group: str) -> Awaitable[None]:
            last = Stage(attempt.migration_id, group, action.first, len(block_ids))
            return attempt.peer.commit(Commit(attempt.migration_id, action.snapshot, last))

        if block_ids:
            sent, _ = await self._links.send(attempt.destination, attempt.peer, block_ids, deliver)
            attempt.blocks += len(block_ids)
            attempt.bytes += sent
        else:
            await attempt.peer.commit(Commit(attempt.migration_id, action.snapshot, None))
        return self._committed(attempt)

    async def _settle(self, attempt: _Attempt) -> protocol.Event:
        try:
            async with asyncio.timeout(self._timeout_s / SETTLE_TRIES):
                given_up = await attempt.peer.cancel(attempt.migration_id)
        except Exception:
            # "Lost" may be said of a replica that only cannot be reached: it is asked again too.
            await asyncio.sleep(SETTLE_PAUSE_S)
            return protocol.Silence()
        if given_up:
            return protocol.Failed("the destination did not commit")
        return self._committed(attempt)

    def _committed(self, attempt: _Attempt) -> protocol.Committed:
        attempt.downtime_s = self._clock() - attempt.parked_at
        return protocol.Committed()

    async def _forward_abort(self, attempt: _Attempt) -> None:
        request_id = attempt.submission.request_id
        await self._steps.run(partial(self._seam.drop, request_id))
        with contextlib.suppress(Exception):  # nobody is attached there: it drops it by itself
            await self._in_time(attempt.peer.abort(request_id))
        attempt.owned.leave(Outcome("aborted"))
