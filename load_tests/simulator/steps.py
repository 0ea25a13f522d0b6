"""The step thread of a simulated instance: steps last as long as the profile says, virtually."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.engine.core import EngineCore

T = TypeVar("T")
Command = tuple[Callable[[], Any], asyncio.Future[Any]]

BLOCKED_S = 0.001
"""As EngineLoop: a step that ran nothing, although there is work, is tried again after this."""


class VirtualSteps:
    """Does for an engine in virtual time what `deployments.engine_loop.EngineLoop` does.

    A step's results are computed at its start and told at its end; commands run between two steps,
    so nobody sees them earlier. It is also the `Pace` of the emulated worker.
    """

    def __init__(
        self, core: EngineCore, publish: Callable[[dict[int, EngineCoreOutputs]], None]
    ) -> None:
        self._core = core
        self._publish = publish
        self._loop = asyncio.get_running_loop()
        self._commands: deque[Command] = deque()
        self._stepping = self._woken = False
        self._seconds = 0.0

    def step(self, seconds: float, follows: bool) -> None:
        """The present step takes so long."""
        self._seconds = seconds

    def call(self, command: Callable[[], T]) -> asyncio.Future[T]:
        """Run `command` at the next step boundary: now, if no step is under way."""
        future: asyncio.Future[T] = self._loop.create_future()
        if self._stepping:
            self._commands.append((command, future))
        else:
            self._run(command, future)
            self._wake()
        return future

    async def run(self, command: Callable[[], T]) -> T:
        """`call` for coroutines."""
        return await self.call(command)

    @staticmethod
    def _run(command: Callable[[], T], future: asyncio.Future[T]) -> None:
        if future.cancelled():
            return
        try:
            future.set_result(command())
        except Exception as error:
            future.set_exception(error)

    def _wake(self) -> None:
        """In a callback of its own, as every step: an error in one must not be a command's."""
        if not self._woken:
            self._woken = True
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self._woken = False
        if self._stepping or not self._core.scheduler.has_requests():
            return
        self._seconds = 0.0
        outputs, executed = self._core.step_fn()
        self._core.post_step(executed)
        self._stepping = True
        if not executed and self._core.scheduler.has_requests():
            self._seconds = BLOCKED_S
        self._loop.call_later(self._seconds, self._boundary, outputs)

    def _boundary(self, outputs: dict[int, EngineCoreOutputs] | None) -> None:
        self._stepping = False
        if outputs:
            self._publish(outputs)
        while self._commands:
            self._run(*self._commands.popleft())
        self._go_on()
