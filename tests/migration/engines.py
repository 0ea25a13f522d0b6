"""Real vLLM engines in the test's process, stepped by hand: no threads, no Ray, no clock."""

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.serial_utils import MsgpackEncoder

from app.config import EngineConfig, ModelConfig
from deployments import engine_config
from migration.engine_seam import EngineSeam, Reservation, Standing
from migration.protocol import source as protocol
from migration.protocol.messages import Refused, Reserved
from migration.resume import resume
from migration.snapshot import CannotMove, Snapshot, Submission
from tests.migration.fakes import Steps

ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 32,
    "kv_cache_memory_bytes": 24 << 20,
    "max_model_len": 4096,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
}
torch.set_num_threads(1)  # two would fight for the cores with all that runs beside

VLLM = EngineConfig()
MOST_STEPS = 2000
_ids = count()

history: dict[str, list[EngineCoreOutput]] = defaultdict(list)
"""All that any engine emitted for a request, in order of time."""


class Engine:
    """One engine and all that it emitted, by request.

    Also the `Clients` of its seam: there is one client, which reads `outputs`.
    """

    def __init__(self, model: str, engine: EngineConfig = VLLM, **changes: Any) -> None:
        # An emulated engine's profile says what it is made of.
        kwargs = changes if engine.emulated else ENGINE | changes
        config = ModelConfig(model_id="tiny", model_source=model, engine_kwargs=kwargs)
        self.core = engine_config.start(engine_config.build(config, engine), transfers=1)
        self.seam = EngineSeam(self.core, self)
        self.outputs: dict[str, list[EngineCoreOutput]] = defaultdict(list)

    def client_index(self, address: str) -> int:
        return 0

    def expect(self, client_index: int, request_id: str, first: int) -> None:
        """The tokens emitted elsewhere and those to come must meet without a gap."""
        assert first == sum(len(out.new_token_ids) for out in history[request_id])

    def forget(self, client_index: int, request_id: str) -> None:
        pass

    def step(self) -> None:
        """One engine step."""
        outputs, executed = self.core.step_fn()
        self.core.post_step(executed)
        for output in outputs[0].outputs if outputs and 0 in outputs else ():
            self.outputs[output.request_id].append(output)
            history[output.request_id].append(output)

    def tokens(self, request_id: str) -> list[int]:
        """Token ids that this engine emitted for the request."""
        return [token for out in self.outputs[request_id] for token in out.new_token_ids]

    def run_until(self, request_id: str, tokens: int) -> None:
        """Step until the request has emitted so many tokens here."""
        for _ in range(MOST_STEPS):
            if len(self.tokens(request_id)) >= tokens:
                return
            self.step()
        raise AssertionError(f"{request_id} stands still")

    def run_out(self) -> None:
        """Step until nothing is left to do."""
        for _ in range(MOST_STEPS):
            if not self.core.scheduler.has_requests():
                return
            self.step()
        raise AssertionError("the engine does not come to rest")

    @property
    def is_clean(self) -> bool:
        """No block, request or runner state is left behind."""
        scheduler, worker = self.core.scheduler, self.worker
        emulated = hasattr(worker, "sequences")
        known = worker.sequences if emulated else worker.model_runner.requests
        return (
            self.seam.blocks_free == self.seam.blocks_total
            and self.core.reset_prefix_cache()
            and not (scheduler.requests or scheduler.running or len(known))
            and not scheduler._inflight_prefills
        )

    @property
    def worker(self) -> Any:
        """The MigrationWorker of this engine."""
        return self.core.model_executor.driver_worker.worker


def submission(prompt: list[int], **sampling: Any) -> Submission:
    """A request as the ingress would encode it."""
    params = SamplingParams(**{"max_tokens": 60, "temperature": 0.0, **sampling})
    if params.structured_outputs is not None:
        params.structured_outputs._backend = "xgrammar"
    # The front end's tokenizer would do this: a token of the tiny model is a byte.
    params._bad_words_token_ids = [list(word.encode()) for word in params.bad_words or ()]
    request_id = f"r{next(_ids):06}"  # vLLM's priority queue breaks ties by it
    request = EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    (encoded,) = MsgpackEncoder().encode(request)
    return Submission(request_id, request_id, bytes(encoded), len(prompt), "normal", "nowhere")


def reserve(source: Engine, destination: Engine, request: Submission) -> Reservation:
    """A reservation that must succeed."""
    standing = source.seam.inspect(request)
    tokens = standing.snapshot.computed_tokens + standing.growth
    answer = destination.seam.reserve(standing.snapshot, tokens, keep_free=0)
    assert not isinstance(answer, Refused), answer.reason
    return answer


@dataclass(slots=True)
class Move:
    """One attempt to move a request: carries out what the protocol's source says, step by step.

    Between two stages both engines make `steps` steps, as they would while bytes travel.
    """

    source: Engine
    destination: Engine
    request: Submission
    copy: bool = True
    steps: int = 1
    blocks: int = 0
    block_ids: list[int] = field(default_factory=list)
    reservation: Reservation | None = None

    def run(self, max_stages: int = 8) -> protocol.End:
        """Until the request runs on one of the two; how it ended."""
        machine = protocol.Source(self.source.seam.block_size, max_stages)
        action = machine.start()
        while not isinstance(action, protocol.End):
            try:
                event = self._perform(action)
            except CannotMove as error:
                event = protocol.Failed(str(error))
            action = machine.on(event)
        return action

    def _perform(self, action: protocol.Action) -> protocol.Event:
        here, there = self.source.seam, self.destination.seam
        match action:
            case protocol.Inspect():
                return self._inspected(here.inspect(self.request))
            case protocol.AskReserve(snapshot, tokens):
                return self._reserve(there.reserve(snapshot, tokens, keep_free=0))
            case protocol.AskExtend(tokens):
                assert self.reservation is not None
                return there.extend(self.reservation, tokens, keep_free=0) or self._granted()
            case protocol.Copy(first, count):
                self._copy(first, count)
                for _ in range(self.steps):
                    self.source.step()
                    self.destination.step()
            case protocol.Park():
                standing = here.park(self.request)
                assert standing is not None
                self.block_ids = standing.block_ids
                return protocol.Parked(standing.snapshot)
            case protocol.SendCommit(snapshot, first):
                used = here.blocks_for(snapshot.computed_tokens)
                self._copy(first, used - first)
                assert self.reservation is not None
                there.install(self.reservation, snapshot)
                return protocol.Committed()
            case protocol.Release():
                here.drop(self.request.request_id)
                self.source.step()  # before it can hear of the request again
            case protocol.Unpark():
                here.unpark(self.request.request_id)
            case protocol.Cancel() if self.reservation is not None:
                there.cancel(self.reservation)
        return protocol.Done()

    def _inspected(self, standing: Standing) -> protocol.Event:
        self.block_ids = standing.block_ids
        return protocol.Inspected(standing.snapshot, standing.growth)

    def _reserve(self, answer: Reservation | Refused) -> protocol.Event:
        if isinstance(answer, Refused):
            return answer
        self.reservation = answer
        if grammar := self.destination.seam.grammar(answer):
            grammar.result(timeout=30)
        return self._granted()

    def _granted(self) -> Reserved:
        assert self.reservation is not None
        capacity = self.destination.seam.capacity(self.reservation)
        return Reserved(capacity, self.reservation.cached_blocks)

    def _copy(self, first: int, count: int) -> None:
        """The transport's work, within one process."""
        assert self.reservation is not None
        ids = self.block_ids[first : first + count]
        into = self.reservation.block_ids[first : first + count]
        self.blocks += len(ids)
        if self.copy:
            ours, theirs = self.source.worker, self.destination.worker
            for source, destination in zip(ours._mig_kv(), theirs._mig_kv(), strict=True):
                destination[into] = source[ids]


def move(source: Engine, destination: Engine, request: Submission, **options: Any) -> int:
    """A move that must complete; the blocks copied."""
    attempt = Move(source, destination, request, **options)
    end = attempt.run()
    assert end.outcome == "completed", end.detail
    return attempt.blocks


def renewed(request: Submission) -> Submission:
    """The same request under another id, as the ingress submits it again; its history goes on."""
    again = replace(request, request_id=f"r{next(_ids):06}")
    history[again.request_id] = history[request.request_id]
    return again


def revive(engine: Engine, lost: Submission) -> Submission:
    """Let this engine go on with a request of which nothing is left but what it has said."""
    again = renewed(lost)
    tokens = [token for out in history[lost.request_id] for token in out.new_token_ids]
    snapshot = Snapshot(again, tuple(tokens))
    asyncio.run(resume(Steps(), engine.seam, snapshot, timeout_s=30))
    return again
