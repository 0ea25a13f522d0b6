"""FleetClient: vLLM's EngineCoreClient over a whole fleet. One request = one open call to a
replica.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable
from typing import Any

import msgspec
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.serial_utils import MsgpackEncoder

from app import refusals, request_context
from app.endings import Endings
from app.fleet_stats import FleetStats
from app.gate import Gate
from app.journal import Entry, Journal, State
from app.priorities import Priorities
from app.refusals import Answer, Refusal
from deployments.consult import NoInstance
from deployments.messages import Hello
from deployments.outbox import Inbox, Ownership, Step
from deployments.pinned import ReplicaGone, call, pinned
from migration.ownership import Outcome
from migration.snapshot import MigrationRecord, Submission

GAP_S = 5.0
"""A token missing for this long is lost: the request fails rather than stand still."""

PLACE_S = 30.0
"""A request that no instance has owned for this long is refused; one that owns it says so between
two of its steps."""

logger = logging.getLogger("ray.serve.llumnix")


class _Resources:
    """What AsyncLLM asks of its client's resources: a fleet as such never dies."""

    engine_dead = False


class FleetClient(EngineCoreClient):
    """What AsyncLLM talks to instead of one engine."""

    engine_ranks_managed = (0,)

    def __init__(
        self,
        replicas: DeploymentHandle,
        inbox: Inbox,
        hello: Hello,
        priorities: Priorities,
        gate: Gate,
    ) -> None:
        self.journal = Journal()
        self.resources = _Resources()
        self._replicas = replicas.options(_by_reference=False)
        self._inbox = inbox
        self._hello = hello
        self._priorities = priorities
        self._gate = gate
        self._encoder = MsgpackEncoder()
        self._stats = FleetStats()
        self._outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self.endings = Endings(self._outputs)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reader: asyncio.Task[Any] | None = None
        self._own(self._pump())
        self._own(self._watch())

    # --- EngineCoreClient --------------------------------------------------------------------

    async def get_output_async(self) -> EngineCoreOutputs:
        self._reader = asyncio.current_task()
        return await self._outputs.get()

    async def get_supported_tasks_async(self) -> tuple[Any, ...]:
        return self._hello.supported_tasks

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Returns at once: what goes wrong later arrives as the request's last output."""
        answer = refusals.current.get(None) or Answer(begun=True)
        entry = self._entry(request, answer)
        patient = self._priorities.is_patient(entry.submission.priority_class, request.priority)
        if refusal := self._gate.admit(entry.submission, answer, patient):
            await self.endings.end(request.request_id, answer, refusal)
            return
        answer.running.add(request.request_id)
        self.journal.open(entry)
        entry.call = self._own(self._hold(entry))

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Free requests where they are now: the clients are gone, or a stop string was found."""
        # AsyncLLM's reader of outputs looks for stop strings; all others abort for a client.
        state: State = "finished" if asyncio.current_task() is self._reader else "aborted"
        for request_id in request_ids:
            if entry := self.journal.get(request_id):
                entry.state = state
                self._abort(entry)

    async def reset_mm_cache_async(self) -> None:
        """Each replica keeps its own."""

    def shutdown(self, timeout: float | None = None) -> None:
        for task in self._tasks:
            task.cancel()
        self._inbox.close()

    # --- requests ----------------------------------------------------------------------------

    def _entry(self, request: EngineCoreRequest, answer: Answer) -> Entry:
        context = request_context.current.get()
        priority_class, request.priority = self._priorities.place(
            context.caller, context.priority_class, request.priority
        )
        response_id = (request.external_req_id or "").removesuffix("-0")
        (encoded,) = self._encoder.encode(request)
        submission = Submission(
            request_id=request.request_id,
            public_id=self.journal.free_public_id(context.chosen_id or response_id),
            request=bytes(encoded),
            prompt_tokens=len(request.prompt_token_ids or ()),
            priority_class=priority_class,
            ingress=self._inbox.address,
            fingerprint=self._hello.fingerprint,
        )
        aliases = (response_id, context.request_id or response_id)
        return Entry(submission, aliases, answer, time.monotonic())

    async def _hold(self, entry: Entry) -> None:
        """Keep a call open at the replica that owns the request, wherever it moves."""
        request_id = entry.submission.request_id
        try:
            outcome = await self._left(entry, call(self._replicas, "submit", entry.submission))
            while outcome.kind == "moved" and outcome.destination and not entry.ended:
                entry.moved_to(outcome.destination)
                owner = pinned(self._replicas, outcome.destination)
                outcome = await self._left(entry, call(owner, "attach", request_id))
        except NoInstance as error:
            await self._turn_away(entry, str(error))
            return
        except Exception as error:  # over gRPC a dead engine's error arrives as it was raised
            await self._fail(entry, f"its replica was lost ({type(error).__name__})")
            return
        if outcome.kind != "finished":
            await self._fail(entry, f"its replica says: {outcome.kind}")
        elif not entry.ended:
            entry.left_at = time.monotonic()  # its last tokens may still be on their way

    async def _left(self, entry: Entry, leaving: Awaitable[Outcome]) -> Outcome:
        """How the request left the replica of an open call. Raises where that died with it."""
        held = len(entry.replicas)
        try:
            return await leaving
        except Exception:
            if len(entry.replicas) <= max(held, 1):
                raise
            return Outcome("moved", entry.replicas[-1])  # the new owner said so, the old one died

    def _abort(self, entry: Entry) -> None:
        self._close(entry)
        if entry.call is not None and not entry.call.done():
            entry.call.cancel()  # over gRPC this reaches the replica
            if entry.replicas:
                # It may be about to move: then only the new owner can be told.
                self._own(self._abort_at(entry.replicas[-1], entry.submission.request_id))

    async def _abort_at(self, replica_id: str, request_id: str) -> None:
        try:
            async with asyncio.timeout(GAP_S):
                await call(pinned(self._replicas, replica_id), "abort", request_id)
        except (RayError, RayServeException, ReplicaGone, TimeoutError):
            pass  # it is gone, and the request with it

    def _close(self, entry: Entry) -> None:
        self.journal.close(entry)
        self._gate.left(entry.submission.request_id)
        entry.answer.running.discard(entry.submission.request_id)

    async def _turn_away(self, entry: Entry, why: str) -> None:
        if entry.ended:
            return
        message = f"no instance takes the request: {why}; try again later"
        self._gate.turned_away(entry.submission.priority_class, "no_instance", message)
        await self._give_up(entry, message)

    async def _fail(self, entry: Entry, reason: str) -> None:
        if entry.ended:
            return
        logger.error(
            "request %s failed on %s after %d tokens: %s",
            entry.submission.public_id,
            entry.replicas[-1] if entry.replicas else "no replica yet",
            entry.output_tokens,
            reason,
        )
        await self._give_up(entry, f"the request failed: {reason}; try again")

    async def _give_up(self, entry: Entry, why: str) -> None:
        entry.state = "failed"
        self._close(entry)
        await self.endings.end(entry.submission.request_id, entry.answer, Refusal(503, why))

    # --- what the replicas send ----------------------------------------------------------------

    async def _pump(self) -> None:
        while True:
            try:
                message = await self._inbox.receive()
            except (msgspec.MsgspecError, ValueError) as error:
                logger.warning("unreadable message dropped: %s", error)
                continue
            if isinstance(message, Step):
                self._step(message)
            elif entry := self.journal.known(message.request_id):
                if isinstance(message, Ownership):
                    entry.moved_to(message.replica_id)
                elif isinstance(message, MigrationRecord):
                    entry.migrations.append(msgspec.structs.replace(message, at=time.time()))

    def _step(self, step: Step) -> None:
        outputs = step.outputs
        # Replicas' monotonic clocks are their own; here they become this process'.
        now = time.monotonic()
        shift = now - outputs.timestamp
        ready: list[EngineCoreOutput] = []
        for first, output in zip(step.first, outputs.outputs, strict=True):
            entry = self.journal.get(output.request_id)
            if entry is None:
                continue
            for event in output.events or ():
                event.timestamp += shift
            ready += entry.accept(first, output)
            if entry.state != "waiting":
                self._gate.left(output.request_id)
            if entry.ended:
                self._close(entry)
        if outputs.scheduler_stats is not None:
            outputs.scheduler_stats = self._stats.merged(step.replica_id, outputs.scheduler_stats)
        outputs.outputs, outputs.timestamp = ready, now
        self._outputs.put_nowait(outputs)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(GAP_S / 5)
            now = time.monotonic()
            for entry in self.journal.live():
                if min(entry.gap_since or math.inf, entry.left_at or math.inf) < now - GAP_S:
                    await self._fail(entry, "a token got lost on its way")
                    self._abort(entry)
                elif entry.unplaced and entry.opened_at < now - PLACE_S:
                    await self._turn_away(entry, f"none did for {PLACE_S:.0f} s")
                    self._abort(entry)

    def _own(self, coroutine: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
