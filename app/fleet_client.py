"""FleetClient: vLLM's EngineCoreClient over a whole fleet. One request = one open call to a
replica.
"""

import asyncio
import logging
import sys
import time
from typing import Any

import msgspec
from ray.serve.handle import DeploymentHandle
from vllm.sampling_params import SamplingType
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.serial_utils import MsgpackEncoder

from app import refusals, request_context
from app.config import RecoveryConfig
from app.endings import Endings
from app.entry import Entry, State
from app.fleet_stats import FleetStats
from app.gate import Gate
from app.journal import Journal
from app.keeper import GaveUp, Keeper
from app.priorities import Priorities
from app.refusals import Answer, Refusal
from app.tasks import Tasks
from app.vitals import Vitals
from app.watch import Watch
from deployments.consult import NoInstance
from deployments.messages import Hello, Route
from deployments.outbox import Inbox, Ownership, Step
from migration.snapshot import Submission

logger = logging.getLogger("ray.serve.llumnix")


class _Resources:
    """What AsyncLLM asks of its client's resources: a fleet never dies, but its reader may."""

    def __init__(self, *tasks: "asyncio.Task[Any]") -> None:
        self._tasks = tasks

    @property
    def engine_dead(self) -> bool:
        """Then Serve replaces this ingress."""
        return any(task.done() for task in self._tasks)


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
        recovery: RecoveryConfig,
    ) -> None:
        self.journal = Journal(recovery.max_journal_tokens)
        self._inbox = inbox
        self._hello = hello
        self._priorities = priorities
        self._gate = gate
        self._encoder = MsgpackEncoder(size_threshold=sys.maxsize)  # tensors, too, in one buffer
        self._stats = FleetStats()
        self._outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self.endings = Endings(self._outputs)
        self._reader: asyncio.Task[Any] | None = None
        replicas = replicas.options(_by_reference=False)
        self._tasks = Tasks()
        self._vitals = Vitals(recovery.hang_s)
        self._keeper = Keeper(replicas, self.journal, self._vitals, recovery, self._tasks)
        watch = Watch(replicas, self._keeper, self._vitals, recovery.hang_s, self._tasks)
        self.resources = _Resources(self._tasks.start(self._pump()), self._tasks.start(watch.run()))

    @property
    def recoveries(self) -> int:
        """How often a request that lost its instance has found a new one."""
        return self._keeper.recoveries

    # --- EngineCoreClient --------------------------------------------------------------------

    async def get_output_async(self) -> EngineCoreOutputs:
        self._reader = asyncio.current_task()
        return await self._outputs.get()

    async def get_supported_tasks_async(self) -> tuple[Any, ...]:
        return self._hello.supported_tasks

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Returns at once: what goes wrong later ends the request by a refusal (`Endings`).

        Raises ValueError for input that streams in: each piece comes as a request of the same id.
        """
        if request.abort_immediately:
            return  # it would free what a KV connector holds, and ours has never heard of it
        if request.resumable:
            raise ValueError("input that streams in (/v1/realtime) is not supported by a fleet")
        answer = refusals.current.get(None) or Answer(http=False)
        try:
            entry = self._entry(request, answer)
        except (OverflowError, TypeError, ValueError, msgspec.MsgspecError) as error:
            # Raised, it would leave the request in vLLM's front end for ever.
            malformed = Refusal(400, f"the request cannot be sent to an engine: {error}")
            await self.endings.end(request.request_id, answer, malformed)
            return
        patient = self._priorities.is_patient(entry.submission.priority_class, request.priority)
        if refusal := self._gate.admit(entry.submission, answer, patient):
            await self.endings.end(request.request_id, answer, refusal)
            return
        answer.running.add(request.request_id)
        self.journal.open(entry)
        entry.call = self._tasks.start(self._keep(entry))

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
        self._tasks.cancel()
        self._inbox.close()

    # --- requests ----------------------------------------------------------------------------

    def _entry(self, request: EngineCoreRequest, answer: Answer) -> Entry:
        context = request_context.current.get()
        # Later turns of an answer (built-in tools) come with a priority that is vLLM's own wish.
        answer.placed = answer.placed or self._priorities.place(
            context.caller, context.priority_class, request.priority
        )
        priority_class, request.priority = answer.placed
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
        now = time.monotonic()
        route = Route(self._vitals.avoid(now))
        return Entry(submission, aliases, answer, now, route, self._is_continuable(request))

    def _is_continuable(self, request: EngineCoreRequest) -> bool:
        """As `EngineSeam.revive` has it."""
        params = request.sampling_params
        seeded = params is not None and params.sampling_type is SamplingType.RANDOM_SEED
        more_than_tokens = request.mm_features or request.prompt_embeds is not None
        return not (more_than_tokens or (seeded and not self._hello.can_redraw))

    async def _keep(self, entry: Entry) -> None:
        try:
            await self._keeper.keep(entry)
        except NoInstance as error:
            await self._turn_away(entry, str(error))
        except GaveUp as error:
            await self._fail(entry, str(error))
        except Exception as error:  # a mistake of ours: its client must not wait for ever
            logger.exception("keeping request %s", entry.submission.public_id)
            await self._fail(entry, f"the ingress failed on it ({type(error).__name__})")

    def _abort(self, entry: Entry) -> None:
        self._close(entry)
        if entry.call is not None and not entry.call.done():
            entry.call.cancel()  # over gRPC this reaches the replica
            if entry.place is not None:
                # It may be about to move: then only the new owner can be told.
                self._keeper.disown(entry.place, entry.submission.request_id)

    def _close(self, entry: Entry) -> None:
        self.journal.close(entry)
        self._gate.left(entry.request_id)
        entry.answer.running.discard(entry.request_id)

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
            entry.place or "no replica yet",
            entry.output_tokens,
            reason,
        )
        await self._give_up(entry, f"the request failed: {reason}; try again")

    async def _give_up(self, entry: Entry, why: str) -> None:
        entry.state = "failed"
        self._close(entry)
        await self.endings.end(entry.request_id, entry.answer, Refusal(503, why))

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
            elif isinstance(message, Ownership):
                self._owned(message)
            elif entry := self.journal.known(message.request_id):
                entry.migrations.append(msgspec.structs.replace(message, at=time.time()))

    def _owned(self, message: Ownership) -> None:
        self._vitals.heard(message.replica_id, time.monotonic())
        if entry := self.journal.present(message.request_id):
            self._keeper.owned(entry, message.replica_id, message.first)
        else:  # its client left, or it went on elsewhere: a move that its lost instance had begun
            self._keeper.disown(message.replica_id, message.request_id)

    def _step(self, step: Step) -> None:
        outputs = step.outputs
        # Replicas' monotonic clocks are their own; here they become this process'.
        now = time.monotonic()
        shift = now - outputs.timestamp
        self._vitals.heard(step.replica_id, now)
        ready: list[EngineCoreOutput] = []
        for first, output in zip(step.first, outputs.outputs, strict=True):
            entry = self.journal.present(output.request_id)
            if entry is None:
                continue
            if not entry.may_say(step.replica_id, first, output):
                self._keeper.overheard(entry, step.replica_id)
                continue
            for event in output.events or ():
                event.timestamp += shift
            ready += self.journal.accept(entry, first, output)
            if entry.state != "waiting":
                self._gate.left(entry.request_id)
            if entry.ended:
                self._close(entry)
        if outputs.scheduler_stats is not None:
            outputs.scheduler_stats = self._stats.merged(
                step.replica_id, outputs.scheduler_stats, now
            )
        outputs.outputs, outputs.timestamp = ready, now
        self._outputs.put_nowait(outputs)
