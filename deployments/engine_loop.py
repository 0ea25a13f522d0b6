"""The step thread: it alone touches the EngineCore, and runs commands only between two steps."""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.engine.core import EngineCore

T = TypeVar("T")
Command = tuple[Callable[[], Any], Future[Any]]
Publish = Callable[[dict[int, EngineCoreOutputs]], None]

logger = logging.getLogger("ray.serve.llumnix")


class EngineDead(RuntimeError):
    """The step thread ended: nothing that runs here will go on."""


class EngineLoop:
    """Steps an in-process EngineCore while it has requests, and sleeps while it has none.

    `publish` gets the outputs of each step, on the step thread, keyed by client index. `on_death`
    is called once, on the step thread, if the engine fails.
    """

    def __init__(
        self, core: EngineCore, publish: Publish, on_death: Callable[[BaseException], None]
    ) -> None:
        self._core = core
        self._publish = publish
        self._on_death = on_death
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._busy_since: float | None = None
        self.dead: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine-step", daemon=True)

    def start(self) -> None:
        """Begin stepping."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the present step. Commands still queued fail with EngineDead."""
        self._commands.put(None)
        self._thread.join()

    def call(self, command: Callable[[], T]) -> Future[T]:
        """Run `command` on the step thread before the next step."""
        future: Future[T] = Future()
        if self.dead is not None:
            future.set_exception(EngineDead(str(self.dead)))
        else:
            self._commands.put((command, future))
            if self.dead is not None:  # it died in between: nobody else would answer
                self._fail_queued()
        return future

    async def run(self, command: Callable[[], T]) -> T:
        """`call` for coroutines."""
        return await asyncio.wrap_future(self.call(command))

    def stuck_for(self, now: float) -> float:
        """Seconds (of time.monotonic) that the present step or command has taken; 0 while idle."""
        since = self._busy_since
        return now - since if since is not None else 0.0

    def _run(self) -> None:
        try:
            while self._run_commands():
                self._step()
            self.dead = EngineDead("the engine was stopped")
        except BaseException as error:
            self.dead = error
            logger.error("engine died: %s: %s", type(error).__name__, error)
            self._on_death(error)
        finally:
            self._fail_queued()

    def _step(self) -> None:
        with self._busy():
            outputs, executed = self._core.step_fn()
            self._core.post_step(executed)
        if outputs:
            self._publish(outputs)
        if not executed and self._has_work():
            # Only blocked requests (a grammar being compiled): vLLM's own loop pauses as long.
            time.sleep(0.001)

    def _run_commands(self) -> bool:
        """Run what is queued; wait for a command while there is nothing to step. False to stop."""
        while True:
            try:
                item = self._commands.get(block=not self._has_work())
            except queue.Empty:
                return True
            if item is None:
                return False
            command, future = item
            if future.set_running_or_notify_cancel():
                try:
                    with self._busy():
                        result = command()
                    future.set_result(result)
                except Exception as error:
                    future.set_exception(error)

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        self._busy_since = time.monotonic()
        try:
            yield
        finally:
            self._busy_since = None

    def _has_work(self) -> bool:
        return bool(self._core.batch_queue) or self._core.scheduler.has_requests()

    def _fail_queued(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._commands.get_nowait()
                if item is not None and item[1].set_running_or_notify_cancel():
                    item[1].set_exception(EngineDead(str(self.dead)))
