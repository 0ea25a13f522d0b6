"""The control of the exactness test: a fleet that moves requests without their KV bytes."""

from typing import Any

import torch
from ray.serve import Application

from app.check import validate_args
from app.main import build_fleet
from migration.worker import MigrationWorker


class NoCopyWorker(MigrationWorker):
    """Receives the blocks and throws them away."""

    def _mig_write(self, ids: torch.Tensor, packed: torch.Tensor) -> None:
        """Leave in the reserved blocks what was there before."""


def build_app(args: dict[str, Any]) -> Application:
    """`import_path` of the control fleet."""
    return build_fleet(validate_args(args), "tests.e2e.no_copy.NoCopyWorker")
