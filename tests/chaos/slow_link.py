"""A paced fleet whose copies take four times as long: time enough for somebody to die in one."""

import time
from typing import Any

import torch
from ray.serve import Application

from app.check import validate_args
from app.main import build_fleet
from load_tests.paced import COPY_TOKEN_S, PacedWorker


class SlowLinkWorker(PacedWorker):
    """Each block arrives late."""

    def _mig_write(self, ids: torch.Tensor, packed: torch.Tensor) -> None:
        time.sleep(3 * COPY_TOKEN_S * self.model_runner.cache_config.block_size * len(ids))
        super()._mig_write(ids, packed)


def build_app(args: dict[str, Any]) -> Application:
    """`import_path` of this fleet."""
    return build_fleet(validate_args(args), "tests.chaos.slow_link.SlowLinkWorker")
