"""A fleet whose engines hang when they are to hand over a request that is called `stuck`."""

import time
from typing import Any

from ray.serve import Application

from app.check import validate_args
from app.main import build_fleet
from migration.worker import MigrationWorker

HANGS_S = 15.0


class StuckWorker(MigrationWorker):
    """Its step thread does not come back for a while."""

    def mig_generator(self, request_id: str) -> bytes | None:
        if "stuck" in request_id:
            time.sleep(HANGS_S)
        return super().mig_generator(request_id)


def build_app(args: dict[str, Any]) -> Application:
    """`import_path` of this fleet."""
    return build_fleet(validate_args(args), "tests.e2e.stuck.StuckWorker")
