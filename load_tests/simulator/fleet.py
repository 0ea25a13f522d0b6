"""A whole fleet under a virtual clock: from a trace to what came of it."""

import asyncio
import gc
import random
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

from app.config import FleetConfig
from app.main import pairing_rule, scaling_rule
from deployments import engine_config
from deployments.emulated.profile import load_profile
from deployments.messages import Orders, Report
from deployments.policy.global_scheduler import GlobalScheduler
from load_tests.outcome import Sample, Served
from load_tests.simulator import virtual_time
from load_tests.simulator.client import VirtualClient
from load_tests.simulator.controller import Controller
from load_tests.simulator.instance import VirtualInstance
from load_tests.simulator.network import Delays, Network
from load_tests.traces.trace import TraceRequest
from migration.snapshot import MigrationRecord

SAMPLE_S = 0.5
"""Between two looks at all loads."""

WARM_UP_S = 2.0
"""Every instance has reported by then."""


class Simulation:
    """One run; `served`, `samples` and `moves` are what came of it. Times begin with the trace."""

    def __init__(self, config: FleetConfig, seed: int, delays: Delays | None = None) -> None:
        assert config.engine.emulated is not None
        self._config = config
        self._seed = seed
        profile = load_profile(config.engine.emulated.profile)
        self._network = Network(delays or Delays(), profile)
        self._scheduler = GlobalScheduler(
            config.dispatch, pairing_rule(config), random.Random(seed)
        )
        longest = engine_config.build(config.model, config.engine).model_config.max_model_len
        self._client = VirtualClient(
            self._scheduler, self._network, config.priorities, seed, longest
        )
        self._controller = Controller(
            self._make, self._scheduler, scaling_rule(config), self._network.delays.load
        )
        self.samples: list[Sample] = []
        self.report_s = array("d")
        """Real seconds that the scheduler took for each report, pairing included."""
        self._main: asyncio.Task[Any] | None = None
        self._error: BaseException | None = None

    @property
    def served(self) -> list[Served]:
        """The requests, in the order of their arrival."""
        return self._client.served

    @property
    def moves(self) -> list[MigrationRecord]:
        """All attempts to move one."""
        return self._client.moves

    @property
    def decision_s(self) -> list[float]:
        """Real seconds that each dispatch decision took."""
        return self._client.decision_s

    def run(self, trace: Sequence[TraceRequest], progress: Callable[[], None]) -> float:
        """Play the trace; the virtual seconds until its last request ended.

        `progress` is called when a request has ended.
        """
        try:
            return virtual_time.run(self._run(trace, progress))
        except asyncio.CancelledError:
            if self._error is not None:
                raise self._error from None
            raise
        finally:
            gc.unfreeze()

    async def _run(self, trace: Sequence[TraceRequest], progress: Callable[[], None]) -> float:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._give_up)
        self._main = asyncio.current_task()
        # Everything here, vLLM's events included, tells the time by it.
        with patch("time.monotonic", loop.time):
            self._controller.begin(self._config.first_replicas)
            gc.collect()
            gc.freeze()  # the engines stay: no need to look through them again and again
            await asyncio.sleep(WARM_UP_S)
            self._client.start = loop.time()
            background = [loop.create_task(c) for c in (self._sample(), self._controller.run())]
            for task in background:
                task.add_done_callback(self._ended)
            await self._play(trace, progress)
            for task in background:
                task.cancel()
            return self._client.now()

    def _give_up(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A step raised: without its engine the run would never end."""
        if "handle" in context:
            self._fail(context.get("exception"))

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception():
            self._fail(task.exception())

    def _fail(self, error: BaseException | None) -> None:
        if self._error is None and self._main is not None:
            self._error = error
            self._main.cancel()

    def _make(self, replica_id: str) -> VirtualInstance:
        return VirtualInstance(
            replica_id,
            self._config,
            self._network,
            self._report,
            self._client.deliver,
            self._client.on_record,
        )

    async def _play(self, trace: Sequence[TraceRequest], progress: Callable[[], None]) -> None:
        async with asyncio.TaskGroup() as requests:
            for index, request in enumerate(trace):
                await asyncio.sleep(request.at - self._client.now())
                task = requests.create_task(self._client.serve(index, request))
                task.add_done_callback(lambda _: progress())

    async def _report(self, report: Report) -> Orders:
        await asyncio.sleep(self._network.delays.call / 2)
        began = time.perf_counter()
        orders = self._scheduler.report(report, time.monotonic())
        self.report_s.append(time.perf_counter() - began)
        await asyncio.sleep(self._network.delays.call / 2)
        return orders

    async def _sample(self) -> None:
        while True:
            loads = self._scheduler.view(time.monotonic()).loads
            there = tuple(x for x in loads if x.replica_id in self._controller.instances)
            self.samples.append(Sample(self._client.now(), there))
            await asyncio.sleep(SAMPLE_S)
