"""A fleet as fast as LLaMA-7B on A10 GPUs in the paper (Llumnix, OSDI'24), and on any machine.

    import_path: load_tests.paced:build_app

The model of the YAML file computes every token, so streams are what they always are; the rest of
each step's time is slept, and so is a transfer's. Sleep leaves the core and the GIL to others, as a
GPU would.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from ray.serve import Application

from app.check import validate_args
from app.main import build_fleet
from migration.worker import MigrationWorker

STEP_S = 0.044
"""A step in which each request makes one token: it reads all weights once."""

TOKEN_S = 0.22e-3
"""Each token of a step, once they are so many that computing takes longer than reading weights."""

COPY_TOKEN_S = 0.21e-3
"""The KV cache of one token, 512 KiB, on its way to another machine. 8k tokens take 1.7 s."""


def step_s(tokens: int) -> float:
    """Seconds that a step takes which computes so many tokens: 8k are recomputed in 1.8 s."""
    return max(STEP_S, TOKEN_S * tokens) if tokens else 0.0


def paced(execute: Callable[..., Any]) -> Callable[..., Any]:
    """A model runner's `execute_model` that takes as long as `step_s` says, at least."""

    @functools.wraps(execute)
    def execute_model(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        ends = time.perf_counter() + step_s(scheduled.total_num_scheduled_tokens)
        result = execute(scheduled, *args, **kwargs)
        time.sleep(max(0.0, ends - time.perf_counter()))
        return result

    return execute_model


class PacedWorker(MigrationWorker):
    """The worker of such a fleet."""

    def mig_prepare(self, *args: Any, **kwargs: Any) -> None:
        """Hook into the model runner, once the engine is up and has profiled itself."""
        super().mig_prepare(*args, **kwargs)
        self.model_runner.execute_model = paced(self.model_runner.execute_model)

    # The one place that slows transfers: every chunk passes here, on the receiving side, before its
    # blocks count as arrived (tests/e2e/no_copy.py hooks into the same method).
    def _mig_write(self, ids: torch.Tensor, packed: torch.Tensor) -> None:
        block_size = self.model_runner.cache_config.block_size
        time.sleep(COPY_TOKEN_S * block_size * len(ids))
        super()._mig_write(ids, packed)


def build_app(args: dict[str, Any]) -> Application:
    """`import_path` of the paced fleet."""
    return build_fleet(validate_args(args), "load_tests.paced.PacedWorker")
