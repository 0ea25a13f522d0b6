"""Tasks: an owner for background work, which cancels it."""

import asyncio
from collections.abc import Coroutine
from typing import Any


class Tasks:
    """asyncio itself keeps no reference to a running task."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run it beside the caller."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    def cancel(self) -> None:
        """End all that still runs."""
        for task in self._running:
            task.cancel()
