"""Moving requests in and out of a stock vLLM EngineCore: add, park, reserve, install, release.

The seam to vLLM 0.32's scheduler and KV cache manager; an upgrade starts here. Every function runs
on the step thread, between two steps. Nothing in vLLM is changed: *park* takes a request out of the
running batch and leaves its blocks; *reserve* allocates blocks for a request that the scheduler
does not know; *install* hands it over on the native path of "resumed from preemption" (moving.md,
A).
"""

import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.request import Request, RequestStatus
from vllm.v1.serial_utils import MsgpackDecoder

from migration import movable
from migration.protocol.messages import Refused
from migration.snapshot import CannotMove, Snapshot, Submission, UnknownRequest

SLACK_TOKENS = 64
"""What a decoding request may grow between two looks at it."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A request as it stands between two steps.

    `block_ids` are the blocks that hold its computed tokens, in order. `growth` is how many tokens
    more may be computed before it is looked at again.
    """

    snapshot: Snapshot
    block_ids: list[int]
    growth: int


@dataclass(slots=True)
class Reservation:
    """Blocks held for a request that is still owned elsewhere; unknown to the scheduler."""

    request: Request
    block_ids: list[int]
    cached_blocks: int


class Clients(Protocol):
    """Where outputs go: vLLM knows its clients by an index."""

    def client_index(self, address: str) -> int:
        """The index of the ingress at this address."""

    def expect(self, client_index: int, request_id: str, first: int) -> None:
        """This request's next output made here begins with its token number `first`."""

    def forget(self, client_index: int, request_id: str) -> None:
        """This request has no more outputs here."""


class EngineSeam:
    """One EngineCore as the migration sees it."""

    def __init__(self, core: EngineCore, clients: Clients) -> None:
        self.core = core
        self._clients = clients
        self._decoder = MsgpackDecoder(EngineCoreRequest)
        self._held: dict[str, Reservation] = {}

    @property
    def _scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def _kv(self) -> Any:
        return self._scheduler.kv_cache_manager

    @property
    def block_size(self) -> int:
        """Tokens per KV block."""
        return self._scheduler.block_size

    @property
    def blocks_total(self) -> int:
        """Blocks that requests can hold (vLLM keeps one null block for itself)."""
        return self._kv.block_pool.num_gpu_blocks - 1

    @property
    def blocks_free(self) -> int:
        """Blocks that a new request could take; cached blocks that nobody uses are free."""
        return self._kv.block_pool.get_num_free_blocks()

    @property
    def max_batch(self) -> int:
        """Most requests that run at once."""
        return self._scheduler.max_num_running_reqs

    def requests(self) -> dict[str, Request]:
        """All requests that the engine owns, waiting, running and parked."""
        return self._scheduler.requests

    def running(self) -> list[Request]:
        """The running batch."""
        return self._scheduler.running

    def waiting(self) -> Iterator[Request]:
        """The queued requests, the one that would run next first."""
        yield from self._scheduler.kv_holding_waiting
        yield from self._scheduler.waiting

    def head_of_line(self) -> Request | None:
        """The queued request that would run next."""
        return next(self.waiting(), None)

    def counts(self) -> tuple[int, int]:
        """Number of running and of waiting requests."""
        return self._scheduler.get_request_counts()

    def blocks_for(self, tokens: int) -> int:
        """KV blocks that `tokens` tokens take."""
        return -(-tokens // self.block_size)

    def add(self, submission: Submission) -> None:
        """Start a new request."""
        request = self._decode(submission)
        self._clients.expect(request.client_index, request.request_id, 0)
        self.core.add_request(request)

    def drop(self, request_id: str) -> None:
        """Free a request, parked or not: its client is gone, or another instance owns it now.

        No output is emitted; where it is unknown nothing happens.
        """
        if request := self.requests().get(request_id):
            self._clients.forget(request.client_index, request_id)
        self._scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def check_movable(self, request_id: str) -> Request:
        """Raise CannotMove, with the reason, unless the request can be moved exactly."""
        request = self.requests().get(request_id)
        if request is None or request.is_finished():
            raise UnknownRequest("the request has finished")
        movable.check_movable(self.core, request)
        return request

    def inspect(self, submission: Submission) -> Standing:
        """The request as it stands, while it goes on; without its sampler state."""
        return self._standing(self.check_movable(submission.request_id), submission, None)

    def park(self, submission: Submission) -> Standing | None:
        """Take the request out of the batch, its blocks kept; None: tokens in flight, ask next
        step.

        Raises UnknownRequest where it finished in the meantime.
        """
        request = self.check_movable(submission.request_id)
        scheduler = self._scheduler
        if request in scheduler.running:
            scheduler.running.remove(request)
        else:
            scheduler.waiting.remove_requests([request])
            scheduler.kv_holding_waiting.remove_requests([request])
            scheduler.deferred_waiting.discard(request)
        if request.num_in_flight_tokens or request.num_output_placeholders:
            return None  # async scheduling: they are delivered by the steps that computed them
        scheduler._inflight_prefills.discard(request)
        scheduler.prev_step_scheduled_req_ids.discard(request.request_id)
        scheduler.reset_preempted_req_ids.add(request.request_id)
        *_, generator = self.workers("mig_generator", request.request_id)  # the last rank samples
        return self._standing(request, submission, generator)

    def unpark(self, request_id: str) -> bool:
        """Put a request back that `park` took out of the batch, as if nothing had happened.

        Nothing where it is in the batch or a queue, or was aborted. False: tokens are in flight,
        ask next step.
        """
        request, scheduler = self.requests().get(request_id), self._scheduler
        queues = (
            scheduler.running,
            scheduler.waiting,
            scheduler.kv_holding_waiting,
            scheduler.deferred_waiting,
        )
        if request is None or request.is_finished() or any(request in queue for queue in queues):
            return True
        if request.num_in_flight_tokens or request.num_output_placeholders:
            return False
        if request.num_computed_tokens or request.num_output_tokens:
            request.status = RequestStatus.PREEMPTED
        self._enqueue(request)
        return True

    def reserve(self, snapshot: Snapshot, tokens: int, keep_free: float) -> Reservation | Refused:
        """Allocate blocks for the KV of `tokens` tokens; `keep_free` is the freeness that must
        remain.

        A request put on a nearly full instance would be the next one preempted there, so it is
        refused unless the batch it joins can still make `keep_free` steps.
        """
        running, waiting = self.counts()
        if running + waiting >= self.max_batch:
            return Refused(f"its batch is full ({running} running, {waiting} waiting)")
        request_id = snapshot.submission.request_id
        if request_id in self.requests() or request_id in self._scheduler.finished_req_ids:
            # The workers drop what they keep of a request that left in the step after it left.
            return Refused("the request is, or was a step ago, its own")
        request = self._decode(snapshot.submission)
        request.append_output_token_ids(list(snapshot.output_token_ids))
        if not self._has_room(max(tokens, request.num_tokens), keep_free):
            return self._no_room()
        if not tokens:
            return Reservation(request, [], 0)
        hit, hit_tokens, _ = self._kv.get_computed_blocks(request)
        hit_tokens = min(hit_tokens, snapshot.computed_tokens) // self.block_size * self.block_size
        hit = self._kv.truncate_computed_blocks(hit, hit_tokens) if hit_tokens else None
        if not self._allocate(request, tokens, hit, hit_tokens):
            return self._no_room()
        (blocks,) = self._kv.get_block_ids(request.request_id)
        held = self._held[request_id] = Reservation(request, blocks, hit_tokens // self.block_size)
        return held

    def revive(self, snapshot: Snapshot) -> Reservation:
        """A request whose instance was lost, for `install`; it holds no blocks, and needs no room.

        Raises CannotMove where nothing but its tokens is known of it, and more is needed.
        """
        request = self._decode(snapshot.submission)
        movable.check_continuable(self.core, request)
        assert request.sampling_params is not None
        request.sampling_params.prompt_logprobs = None  # they came with the first token
        request.append_output_token_ids(list(snapshot.output_token_ids))
        return Reservation(request, [], 0)

    def extend(self, reservation: Reservation, tokens: int, keep_free: float) -> Refused | None:
        """Hold blocks for `tokens` tokens, if they are not held yet."""
        request, held = reservation.request, self.capacity(reservation)
        tokens = min(tokens, self._kv.max_model_len)
        if tokens <= held:
            return None
        if not self._has_room(tokens - held, keep_free, reservation):
            return self._no_room()
        request.num_computed_tokens = held
        allocated = self._allocate(request, tokens)
        request.num_computed_tokens = 0
        if not allocated:
            return self._no_room()
        (reservation.block_ids,) = self._kv.get_block_ids(request.request_id)
        return None

    def _has_room(
        self, tokens: int, keep_free: float, reservation: Reservation | None = None
    ) -> bool:
        """For a new request, or for more of one that has a reservation.

        Others that move in may be in the middle of their prefill, and will take more than they
        hold: two that do not fit together would both wait for ever.
        """
        running, _ = self.counts()
        others = (each for each in self._held.values() if each is not reservation)
        lacking = (self.blocks_for(x.request.num_tokens) - len(x.block_ids) for x in others)
        free = self.blocks_free - sum(max(0, blocks) for blocks in lacking)
        return free - self.blocks_for(tokens) > keep_free * (running + 1)

    def _no_room(self) -> Refused:
        return Refused(f"it has no room: {self.blocks_free} of {self.blocks_total} blocks free")

    def _allocate(
        self, request: Request, tokens: int, hit: Any = None, hit_tokens: int = 0
    ) -> bool:
        """Blocks up to `tokens` tokens, as if a KV connector were to fill them (moving.md, A4)."""
        tokens = min(tokens, self._kv.max_model_len)
        allocated = self._kv.allocate_slots(
            request,
            0,
            num_new_computed_tokens=hit_tokens,
            new_computed_blocks=hit,
            num_external_computed_tokens=tokens - request.num_computed_tokens - hit_tokens,
            delay_cache_blocks=True,
            reserved_blocks=self._scheduler._inflight_prefill_reserved_blocks(),
            has_scheduled_reqs=bool(self.running()),
            skip_zeroing_group_ids=(0,),
        )
        return allocated is not None

    def capacity(self, reservation: Reservation) -> int:
        """Tokens whose KV the reserved blocks can hold."""
        return len(reservation.block_ids) * self.block_size

    def cancel(self, reservation: Reservation) -> None:
        """Give the reserved blocks back."""
        self._held.pop(reservation.request.request_id, None)
        self._kv.free(reservation.request)

    def grammar(self, reservation: Reservation) -> Future[Any] | None:
        """The compilation to wait for before `install`; None where there is nothing to wait for."""
        structured = reservation.request.structured_output_request
        if structured is None or structured.is_grammar_ready:
            return None
        grammar = structured._grammar
        return grammar if isinstance(grammar, Future) else None

    def install(self, reservation: Reservation, snapshot: Snapshot) -> None:
        """COMMIT: own the request from now on; the KV of its computed tokens is in place."""
        request = reservation.request
        if not snapshot.computed_tokens:
            self._kv.free(request)  # it still waits: the scheduler will allocate what it needs
        known = request.num_output_tokens
        request.append_output_token_ids(list(snapshot.output_token_ids[known:]))
        request.num_computed_tokens = snapshot.computed_tokens
        if snapshot.computed_tokens:
            self._kv.cache_blocks(request, snapshot.computed_tokens)
        self._enter(request, snapshot)
        self._held.pop(request.request_id, None)

    def _decode(self, submission: Submission) -> Request:
        wire: EngineCoreRequest = self._decoder.decode(submission.request)
        wire.request_id = submission.request_id
        wire.client_index = self._clients.client_index(submission.ingress)
        request, _ = self.core.preprocess_add_request(wire)
        return request

    def _enter(self, request: Request, snapshot: Snapshot) -> None:
        """Queue a continued request; a resumed one is drained before all that wait."""
        outputs = list(snapshot.output_token_ids)
        if outputs or snapshot.computed_tokens:
            structured = request.structured_output_request
            if structured is not None and not structured.is_grammar_ready:
                # Waiting for it in the queue would forget the outputs (moving.md, A5).
                raise CannotMove("its grammar is not compiled yet")
            if structured is not None and isinstance(structured.grammar, Exception):
                raise CannotMove(f"its grammar does not compile here: {structured.grammar}")
            request.status = RequestStatus.PREEMPTED
            request.num_preemptions = max(1, snapshot.preemptions)
            if not self.core.structured_output_manager.accept_tokens(request, outputs):
                # Each engine uses the backend that its first schema needed (vLLM's `auto`).
                raise CannotMove("the grammar as it is compiled here does not accept its tokens")
            seed = NewRequestData.from_request(request, ([],))
            self.workers("mig_seed", seed, outputs, snapshot.generator)
        if outputs:
            request.prefill_stats = None  # its prompt was counted where it was computed
        elif snapshot.computed_tokens and request.prefill_stats is not None:
            request.prefill_stats.set(request.num_prompt_tokens, 0, 0)  # counted with token one
        now = time.monotonic()
        request.events = [
            EngineCoreEvent(EngineCoreEventType(kind), now - ago) for kind, ago in snapshot.events
        ]
        self._clients.expect(request.client_index, request.request_id, len(outputs))
        self.requests()[request.request_id] = request
        self._enqueue(request)

    def _enqueue(self, request: Request) -> None:
        self._scheduler._enqueue_waiting_request(request)
        if 0 < request.num_computed_tokens < request.num_tokens - 1:
            self._scheduler._inflight_prefills.add(request)

    def _standing(
        self, request: Request, submission: Submission, generator: bytes | None
    ) -> Standing:
        # Under async scheduling what is in flight is neither computed nor told to anybody yet.
        computed = max(0, request.num_computed_tokens - request.num_in_flight_tokens)
        now = time.monotonic()
        snapshot = Snapshot(
            submission=submission,
            output_token_ids=tuple(request.output_token_ids),
            computed_tokens=computed,
            preemptions=request.num_preemptions,
            generator=generator,
            events=tuple((int(event.type), now - event.timestamp) for event in request.events),
        )
        prefilling = computed < request.num_tokens - 1
        chunk = min(self._scheduler.max_num_scheduled_tokens, request.num_tokens - computed)
        growth = SLACK_TOKENS + (chunk if prefilling else 0)
        (blocks,) = self._kv.get_block_ids(request.request_id)
        return Standing(snapshot, blocks[: self.blocks_for(computed)], growth)

    @property
    def in_process(self) -> bool:
        """Whether the one worker lives in this process."""
        return isinstance(self.core.model_executor, UniProcExecutor)

    def workers(self, method: str, *args: Any) -> list[Any]:
        """Call a MigrationWorker method on every rank."""
        return self.core.collective_rpc(method, args=args)
