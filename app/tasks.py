"""Tasks: an owner for background work, which cancels it."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger("ray.serve.llumnix")


class Tasks:
    """asyncio itself keeps no reference to a running task."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run it beside the caller."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def cancel(self) -> None:
        """End all that still runs."""
        for task in self._running:
            task.cancel()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("ended with an error, and nobody waits for it: %r", task)
