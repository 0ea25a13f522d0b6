"""Clients and ingress of the simulated fleet: requests go out at their time, tokens come in."""

import asyncio
import time

import msgspec
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.serial_utils import MsgpackEncoder

from app.admission import Admission
from app.config import PriorityClass
from app.entry import Entry
from deployments.messages import Ask
from deployments.policy.global_scheduler import GlobalScheduler
from load_tests.outcome import REFUSED, Served
from load_tests.simulator.network import Network
from load_tests.traces.trace import TraceRequest, prompt_ids
from migration.ownership import Outcome
from migration.snapshot import MigrationRecord, Submission


class VirtualClient:
    """Sends each request of a trace, follows it wherever it moves, and keeps what came of it."""

    def __init__(
        self,
        scheduler: GlobalScheduler,
        network: Network,
        priorities: dict[str, PriorityClass],
        seed: int,
        longest: int,
    ) -> None:
        """`longest`: tokens of a request, output included, that an instance takes at most."""
        self._scheduler = scheduler
        self._network = network
        self._priorities = priorities
        self._admission = Admission(priorities)
        self._seed = seed
        self._longest = longest
        self._encoder = MsgpackEncoder()
        self._live: dict[str, tuple[Entry, Served]] = {}
        self.start = 0.0
        """Virtual time at which the trace begins."""
        self.served: list[Served] = []
        self.moves: list[MigrationRecord] = []
        self.decision_s: list[float] = []
        """Real seconds of each dispatch decision."""

    def now(self) -> float:
        """Virtual seconds since the trace began."""
        return time.monotonic() - self.start

    async def serve(self, index: int, request: TraceRequest) -> None:
        """One request from its arrival to its end."""
        served = Served(
            f"r{index:06}",
            request.at,
            request.input_tokens,
            request.output_tokens,
            request.priority,
        )
        self.served.append(served)
        if request.input_tokens + request.output_tokens > self._longest:
            served.error = f"HTTP 400: an instance takes {self._longest} tokens"
            return
        arrival = (request.priority, request.input_tokens, self.now())
        if full := self._admission.check(*arrival):
            served.error = f"{REFUSED}: {full.detail}"
            return
        self._admission.arrived(served.request_id, *arrival)
        entry = Entry(self._submission(index, request))
        self._live[served.request_id] = (entry, served)
        outcome = await self._follow(entry)
        self._admission.left(served.request_id)
        if outcome.kind != "finished" or len(served.tokens) != request.output_tokens:
            served.error = f"{outcome.kind} after {len(served.tokens)} tokens"
        stalls = entry.stalls
        served.queue_s, served.preempted_s = stalls.queue_s, stalls.preempted_s
        served.preemptions = stalls.preemptions
        served.preempted_after_move = stalls.preempted_after_move
        del self._live[served.request_id]

    def deliver(self, replica_id: str, first: int, output: EngineCoreOutput) -> None:
        """Tokens of a request, told at the end of the step that made them."""
        if output.request_id not in self._live:
            return
        entry, served = self._live[output.request_id]
        now = self.now() + self._network.delays.deliver
        for ready in entry.accept(first, output):
            served.tokens.extend([now] * len(ready.new_token_ids))
        if served.tokens:
            self._admission.left(output.request_id)

    def on_record(self, submission: Submission, record: MigrationRecord) -> None:
        """An attempt to move a request ended."""
        if record.outcome == "completed" and (known := self._live.get(submission.request_id)):
            known[1].moves += 1
        self.moves.append(msgspec.structs.replace(record, at=self.now()))

    async def _follow(self, entry: Entry) -> Outcome:
        """As `Keeper` does: a call held open at whoever owns the request."""
        submission, delays = entry.submission, self._network.delays
        await asyncio.sleep(delays.submit / 2)
        replica_id = self._choose(submission)
        await asyncio.sleep(delays.submit / 2)
        entry.owned_by(replica_id, 0)
        outcome = await self._network.llumlets[replica_id].submit(submission)
        while outcome.kind == "moved" and outcome.destination:
            await asyncio.sleep(delays.call)
            entry.owned_by(outcome.destination, entry.output_tokens)
            owner = self._network.llumlets[outcome.destination]
            outcome = await owner.attach(submission.request_id)
        return outcome

    def _choose(self, submission: Submission) -> str:
        priority_class = submission.priority_class
        ask = Ask(
            submission.request_id,
            submission.prompt_tokens,
            priority_class=priority_class,
            headroom_tokens=self._priorities[priority_class].headroom_tokens,
        )
        began = time.perf_counter()
        decision = self._scheduler.choose([ask], time.monotonic())
        self.decision_s.append(time.perf_counter() - began)
        chosen = decision.chosen[0]
        assert chosen is not None, "no instance takes requests"
        return chosen

    def _submission(self, index: int, request: TraceRequest) -> Submission:
        request_id = f"r{index:06}"
        wire = EngineCoreRequest(
            request_id=request_id,
            prompt_token_ids=prompt_ids(index, request.input_tokens, self._seed),
            mm_features=None,
            sampling_params=SamplingParams(
                max_tokens=request.output_tokens, temperature=0.0, ignore_eos=True
            ),
            pooling_params=None,
            arrival_time=request.at,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
            priority=self._priorities[request.priority].priority,
        )
        (encoded,) = self._encoder.encode(wire)
        return Submission(
            request_id,
            request_id,
            bytes(encoded),
            request.input_tokens,
            request.priority,
            "simulated",
        )
