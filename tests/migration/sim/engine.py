"""EngineSeam over a simulated engine: what migration/engine_seam.py does to vLLM's scheduler.

What must never be asked of it is told to its watcher, since the protocol takes exceptions for the
failures that it is made for.
"""

from concurrent.futures import Future
from functools import partial
from typing import Any

from migration.engine_seam import Reservation, Standing
from migration.protocol.messages import Refused
from migration.snapshot import CannotMove, Snapshot, Submission, UnknownRequest
from tests.migration.sim.kv import BLOCK
from tests.migration.sim.steps import CHUNK, MAX_BATCH, SimRequest, SimSteps

GROWTH = 6
"""As SLACK_TOKENS, for blocks as small as these."""


class SimEngine(SimSteps):
    """One engine, its step thread and its seam."""

    block_size = BLOCK
    in_process = True

    def add(self, submission: Submission) -> None:
        self._enter(self._decode(submission), first=False)

    def drop(self, request_id: str) -> None:
        if request := self.requests.get(request_id):
            self._free(request)

    def preempt_soon(self, request_id: str) -> None:
        """Memory runs out for a moment: it loses its blocks, and others overwrite them."""
        self.command(partial(self._force_out, request_id))

    def _force_out(self, request_id: str) -> None:
        request = self.requests.get(request_id)
        if request is not None and request in self.running:
            blocks = list(request.blocks)
            self._preempt(request)
            self.pool.overwrite(blocks)

    def inspect(self, submission: Submission) -> Standing:
        return self._standing(self._find(submission))

    def park(self, submission: Submission) -> Standing | None:
        request = self._find(submission)
        self._dequeue(request)
        self.parked.setdefault(request.request_id, self._loop.time())
        self._watcher.happened("parked")
        return None if request.in_flight else self._standing(request)

    def unpark(self, request_id: str) -> bool:
        if request_id in self.parked:
            if self.requests[request_id].in_flight:
                return False
            self._count_stop(request_id)
            self.waiting.appendleft(self.requests[request_id])
            self._wake.set()
        return True

    def reserve(self, snapshot: Snapshot, tokens: int, keep_free: float) -> Reservation | Refused:
        if len(self.running) + len(self.waiting) >= MAX_BATCH:
            return Refused("its batch is full")
        request = self._decode(snapshot.submission)
        if request.request_id in self.requests or request.request_id in self._left:
            return Refused("the request is, or was a step ago, its own")
        request.tokens += snapshot.output_token_ids
        if not self._has_room(max(tokens, len(request.tokens)), keep_free):
            return Refused("it has no room")
        if not tokens:
            reservation = Reservation(request, [], 0)
        else:
            hit = self.pool.prefix(request.tokens, snapshot.computed_tokens // BLOCK)
            count = self.blocks_for(tokens) - len(hit)
            if count > len(self.pool.free):
                self.pool.give_back(hit)
                return Refused("it has no room")
            blocks = hit + [self.pool.take() for _ in range(count)]
            reservation = Reservation(request, blocks, len(hit))
        if self.grammar_s:
            request.grammar = Future()
            self._loop.call_later(self.grammar_s, request.grammar.set_result, None)
        self.reserved.append(reservation)
        return reservation

    def extend(self, reservation: Reservation, tokens: int, keep_free: float) -> Refused | None:
        if reservation not in self.reserved:
            self._watcher.broken("extended what was given back")
        missing = self.blocks_for(tokens) - len(reservation.block_ids)
        if missing <= 0:
            return None
        if not self._has_room(missing * BLOCK, keep_free):
            return Refused("it has no room")
        more = [self.pool.take() for _ in range(missing)]
        reservation.block_ids = reservation.block_ids + more
        return None

    def capacity(self, reservation: Reservation) -> int:
        return len(reservation.block_ids) * BLOCK

    def cancel(self, reservation: Reservation) -> None:
        if reservation not in self.reserved:
            return self._watcher.broken("gave a reservation back twice")
        self.reserved.remove(reservation)
        self.pool.give_back(reservation.block_ids)

    def grammar(self, reservation: Reservation) -> Future[Any] | None:
        grammar = reservation.request.grammar
        return None if grammar is None or grammar.done() else grammar

    def install(self, reservation: Reservation, snapshot: Snapshot) -> None:
        request: SimRequest = reservation.request
        if reservation not in self.reserved:
            return self._watcher.broken("installed what was given back")
        if request.request_id in self.requests:
            return self._watcher.broken("installed a second copy")
        if self.grammar(reservation) is not None:
            raise CannotMove("its grammar is not compiled yet")
        self.reserved.remove(reservation)
        request.tokens[request.prompt :] = snapshot.output_token_ids
        request.told = len(snapshot.output_token_ids)
        request.blocks, request.computed = reservation.block_ids, snapshot.computed_tokens
        request.preemptions = snapshot.preemptions
        self.pool.remember(request.tokens, request.blocks, request.computed)
        self._enter(request, first=True)
        self.installed.append(request.request_id)
        self._watcher.happened("installed")

    def _has_room(self, tokens: int, keep_free: float) -> bool:
        return len(self.pool.free) - self.blocks_for(tokens) > keep_free * (len(self.running) + 1)

    @staticmethod
    def _decode(submission: Submission) -> SimRequest:
        return SimRequest(submission.request_id, submission, list(submission.request[1:]))

    def _enter(self, request: SimRequest, *, first: bool) -> None:
        self.requests[request.request_id] = request
        if first:
            self.waiting.appendleft(request)
        else:
            self.waiting.append(request)
        self._watcher.owned(self, request.request_id)

    def _find(self, submission: Submission) -> SimRequest:
        request = self.requests.get(submission.request_id)
        if request is None:
            raise UnknownRequest("the request has finished")
        return request

    def _standing(self, request: SimRequest) -> Standing:
        computed = request.computed - request.in_flight
        snapshot = Snapshot(
            request.submission, tuple(request.outputs), computed, request.preemptions
        )
        blocks = list(request.blocks[: self.blocks_for(computed)])
        prefilling = computed < request.prompt + request.told - 1
        return Standing(snapshot, blocks, GROWTH + (CHUNK if prefilling else 0))
