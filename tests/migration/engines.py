"""Real vLLM engines in the test's process, stepped by hand: no threads, no Ray, no clock."""

from collections import defaultdict
from itertools import count
from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.serial_utils import MsgpackEncoder

from app.config import ModelConfig
from deployments import engine_config
from migration.engine_seam import EngineSeam, Reservation
from migration.protocol.messages import Refused
from migration.snapshot import Submission

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

MOST_STEPS = 2000
_ids = count()

history: dict[str, list[EngineCoreOutput]] = defaultdict(list)
"""All that any engine emitted for a request, in order of time."""


class Engine:
    """One engine and all that it emitted, by request.

    Also the `Clients` of its seam: there is one client, which reads `outputs`.
    """

    def __init__(self, model: str) -> None:
        config = ModelConfig(model_id="tiny", model_source=model, engine_kwargs=ENGINE)
        vllm_config = engine_config.build(config, "migration.worker.MigrationWorker")
        self.core = engine_config.start(vllm_config, transfers=1)
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
        scheduler, runner = self.core.scheduler, self.worker.model_runner
        return (
            self.seam.blocks_free == self.seam.blocks_total
            and self.core.reset_prefix_cache()
            and not (scheduler.requests or scheduler.running or runner.requests)
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
    request_id = f"r{next(_ids)}"
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
    tokens = (
        standing.snapshot.computed_tokens and standing.snapshot.computed_tokens + standing.growth
    )
    answer = destination.seam.reserve(standing.snapshot, tokens, keep_free=0)
    assert not isinstance(answer, Refused), answer.reason
    return answer


def move(source: Engine, destination: Engine, request: Submission, *, copy: bool = True) -> int:
    """Move the request as MigrateOut and MigrateIn do, in one go; the blocks copied."""
    reservation = reserve(source, destination, request)
    grammar = destination.seam.grammar(reservation)
    if grammar is not None:
        grammar.result(timeout=30)
    parked = source.seam.park(request)
    assert parked is not None
    wanted = parked.block_ids[reservation.cached_blocks :]
    into = reservation.block_ids[reservation.cached_blocks :][: len(wanted)]
    if copy:
        copy_blocks(source, destination, wanted, into)
    destination.seam.install(reservation, parked.snapshot)
    source.seam.drop(request.request_id)
    source.step()  # as the step thread does, before it can hear of the request again
    return len(wanted)


def copy_blocks(source: Engine, destination: Engine, ids: list[int], into: list[int]) -> None:
    """The transport's work, within one process."""
    for theirs, ours in zip(source.worker._mig_kv(), destination.worker._mig_kv(), strict=True):
        ours[into] = theirs[ids]
