"""The seam to vLLM 0.32's worker: an accelerator that computes next to nothing, and takes its time.

All above it is vLLM's own: executor, scheduler, KV cache manager. Sampling parameters change
nothing but where a stream ends; there are no logprobs.
"""

import time
from types import SimpleNamespace
from typing import Any

import msgspec
import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase

from deployments.emulated.pace import Pace, WallPace
from deployments.emulated.profile import Profile, work
from deployments.emulated.sequences import Sequences
from migration.worker import MigrationWorker

WORKER = "deployments.emulated.worker.EmulatedWorker"
PROFILE = "emulated_profile"
"""Key of the profile in vLLM's `additional_config`."""

LAYER = "layers.0"


def engine_arguments(profile: Profile) -> dict[str, Any]:
    """What the profile decides of vLLM's engine arguments; those of the YAML file go first."""
    tokens = profile.blocks * profile.block_size
    return {
        "block_size": profile.block_size,
        "max_num_seqs": profile.max_batch,
        "max_num_batched_tokens": profile.max_step_tokens,
        "max_model_len": tokens,
        "hf_overrides": {"max_position_embeddings": tokens},
        "enforce_eager": True,
        "async_scheduling": False,  # a step's tokens are there when it ends
    }


class EmulatedWorker(WorkerBase):
    """vLLM's `worker_cls`."""

    def init_device(self) -> None:
        """There is none."""
        settings = self.vllm_config.additional_config
        self.profile = msgspec.convert(settings[PROFILE], Profile)
        self.pace: Pace = WallPace()
        self.device = torch.device("cpu")

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """There are no weights."""

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """One layer, 8 bytes for a token."""
        spec = FullAttentionSpec(
            block_size=self.vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=1,
            dtype=torch.float32,
        )
        return {LAYER: spec}

    def get_supported_kv_cache_layouts(self) -> list[str]:
        return ["LBHNC"]

    def determine_available_memory(self) -> int:
        """Bytes for the profile's blocks and the null block, which vLLM keeps for itself."""
        return (self.profile.blocks + 1) * self.get_kv_cache_spec()[LAYER].page_size_bytes

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Make the KV cache, where MigrationWorker looks for it."""
        block_size = self.vllm_config.cache_config.block_size
        kv = torch.zeros(kv_cache_config.num_blocks, block_size, dtype=torch.int64)
        self.sequences = Sequences(kv, self.vocab_size, self.model_config.max_model_len)
        self.model_runner = SimpleNamespace(
            kv_caches=[kv], kv_cache_config=kv_cache_config, device=self.device
        )

    def compile_or_warm_up_model(self) -> CompilationTimes:
        return CompilationTimes(0.0, 0.0)

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def execute_model(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Compute the step's tokens, then wait as long as the accelerator would have."""
        done = list(self.sequences.execute(step))
        if not done:
            return EMPTY_MODEL_RUNNER_OUTPUT
        seconds = self.profile.step_s(*work((one.start, one.count) for one in done))
        self.pace.step(seconds, _follows(step))
        return ModelRunnerOutput(
            req_ids=[one.request_id for one in done],
            req_id_to_index={one.request_id: index for index, one in enumerate(done)},
            sampled_token_ids=[[] if one.token is None else [one.token] for one in done],
        )

    def emulation_drift(self) -> float:
        """Share by which the steps took longer than the profile says."""
        return self.pace.drift if isinstance(self.pace, WallPace) else 0.0


class EmulatedMigration(MigrationWorker):
    """The worker extension of an emulated engine: a transfer takes as long as the profile says."""

    profile: Profile

    def mig_receive(self, group: str, block_ids: list[int]) -> int:
        """As on a real link: the source's send waits too, and the blocks are written at the end.

        The bytes themselves travel as they always do, in next to no time.
        """
        time.sleep(self.profile.copy_time_s(len(block_ids) * self._mig_kv()[0].shape[1]))
        return super().mig_receive(group, block_ids)


def _follows(step: SchedulerOutput) -> bool:
    """Whether the accelerator was busy until this step: with one that goes on, or has just ended.

    Where nothing is left to run, vLLM tells of those that ended in a step without tokens.
    """
    cached = step.scheduled_cached_reqs
    return len(cached.req_ids) > len(cached.resumed_req_ids) or bool(step.finished_req_ids)
