"""An event loop whose clock jumps to the next timer: minutes of waiting pass in milliseconds."""

import asyncio
import contextlib
import contextvars
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

MOST_TURNS = 100_000
"""Turns of the loop without the clock moving: more is a task that spins."""

HERE: contextvars.ContextVar["set[asyncio.Task[Any]] | None"] = contextvars.ContextVar(
    "HERE", default=None
)
"""Where a new task is noted, so that all that one instance runs can be ended with it."""


class Stuck(AssertionError):
    """Nothing will ever happen any more, or all happens at once without an end."""


class _Timers(selectors.SelectSelector):
    """No file is ever ready; waiting for one moves the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self._turns = 0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Stuck("every task waits for something that will not come")
        self._turns = 0 if timeout > 0 else self._turns + 1
        if self._turns > MOST_TURNS:
            raise Stuck("a task spins")
        self.now += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """asyncio as it is, but for its clock."""

    def __init__(self) -> None:
        self._timers = _Timers()
        super().__init__(self._timers)
        self.set_task_factory(_noted_task)
        self.set_exception_handler(lambda *_: None)  # tasks whose caller hung up

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._timers.now


def _noted_task(
    loop: asyncio.AbstractEventLoop, coroutine: Any, **kwargs: Any
) -> asyncio.Task[Any]:
    task = asyncio.Task(coroutine, loop=loop, **kwargs)
    tasks = HERE.get()
    if tasks is not None:
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    return task


async def _all(tasks: set[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Like asyncio.run, in virtual time."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main)
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        with contextlib.suppress(Stuck):  # they wait for each other, and nobody for them
            loop.run_until_complete(_all(left))
        loop.close()
