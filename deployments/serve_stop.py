"""Learning that Serve stops this replica. The seam to Serve's private state; upgrades start here.

Serve tells a replica nothing of it: it takes it out of the routers' sets, waits until no call is
open, and kills it after `graceful_shutdown_timeout_s`. To be out of the sets is no sure sign, for a
replica whose `user_config` changes is too for a moment; Serve's own flag is.
"""

import asyncio
import logging
from collections.abc import Callable

from ray._private import worker

POLL_S = 0.05

logger = logging.getLogger("ray.serve.llumnix")


def is_stopping() -> bool:
    """Whether Serve has begun to stop the replica in this process, for whatever reason."""
    here = worker.global_worker
    stopping: bool = here.actors[here.actor_id]._replica_impl._shutting_down
    return stopping


async def watch(on_stop: Callable[[], None], stopping: Callable[[], bool] = is_stopping) -> None:
    """Call `on_stop` once Serve has begun to stop this replica."""
    try:
        while not stopping():
            await asyncio.sleep(POLL_S)
    except Exception as error:  # whatever another Ray has instead
        logger.warning(
            "whether Serve stops this replica cannot be seen (%r): drain it by hand first", error
        )
    else:
        on_stop()
