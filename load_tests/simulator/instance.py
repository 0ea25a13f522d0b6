"""A simulated instance: `deployments.instance.Instance` without its process."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

from app.config import FleetConfig
from deployments import engine_config
from deployments.engine_loop import EngineLoop
from deployments.llumlet import Llumlet
from deployments.messages import Orders, Report
from deployments.reporter import Reporter
from load_tests.simulator import virtual_time
from load_tests.simulator.network import Network, VirtualLinks
from load_tests.simulator.steps import VirtualSteps
from migration.destination import Limits, MigrateIn
from migration.engine_seam import EngineSeam
from migration.links import Links
from migration.protocol.timing import orphan_s
from migration.snapshot import MigrationRecord, Submission
from migration.source import MigrateOut

Deliver = Callable[[str, int, EngineCoreOutput], None]
"""(instance, index of the output's first token, output)"""


class VirtualInstance:
    """One engine and its llumlet, on the virtual event loop."""

    def __init__(
        self,
        replica_id: str,
        config: FleetConfig,
        network: Network,
        report: Callable[[Report], Awaitable[Orders]],
        deliver: Deliver,
        on_record: Callable[[Submission, MigrationRecord], None],
    ) -> None:
        self.replica_id = replica_id
        self._deliver = deliver
        self._next: dict[str, int] = {}
        settings, clock = config.migration, asyncio.get_running_loop().time
        core = engine_config.start(engine_config.build(config.model, config.engine), transfers=1)
        worker: Any = core.model_executor.driver_worker.worker
        self._steps = VirtualSteps(core, self._publish)
        worker.pace = self._steps
        self.seam = EngineSeam(core, self)
        # Both only run commands at step boundaries, and blocks over links: these do the same.
        steps = cast(EngineLoop, self._steps)
        links = cast(Links, VirtualLinks(replica_id, network, worker.model_runner.kv_caches[0]))
        self.llumlet = Llumlet(
            replica_id,
            "",  # all run the same model
            steps,
            self.seam,
            config.headroom_tokens,
            settings.max_concurrent,
            orphan_s(settings.timeout_s),
            on_record,
            clock,
        )
        out = MigrateOut(
            replica_id,
            steps,
            self.seam,
            links,
            network.peer,
            settings.timeout_s,
            settings.max_stages,
            clock,
        )
        limits = Limits(settings.max_concurrent, settings.timeout_s)
        own, disown = self.llumlet.own, self.llumlet.disown
        incoming = MigrateIn(steps, self.seam, links, limits, own, disown, clock)
        self.llumlet.connect(out, incoming)
        self._network = network
        network.llumlets[replica_id] = self.llumlet
        self._reporter = Reporter(self.llumlet, report, lambda _: None, settings.enabled)
        self._tasks: set[asyncio.Task[Any]] = set()
        here = virtual_time.HERE.set(self._tasks)
        self._reporter.start()
        virtual_time.HERE.reset(here)

    @property
    def empty(self) -> bool:
        """Whether it owns nothing, and nothing is on its way here."""
        return not self.llumlet.owned and not len(self.llumlet.incoming)

    def stop(self) -> None:
        """Leave the fleet."""
        del self._network.llumlets[self.replica_id]
        for task in self._tasks:
            task.cancel()

    def client_index(self, address: str) -> int:
        """There is one client."""
        return 0

    def expect(self, client_index: int, request_id: str, first: int) -> None:
        """Its next output made here begins with this token."""
        self._next[request_id] = first

    def forget(self, client_index: int, request_id: str) -> None:
        """It has no more outputs here."""
        self._next.pop(request_id, None)

    def _publish(self, outputs: Mapping[int, EngineCoreOutputs]) -> None:
        finished = []
        for step in outputs.values():
            for output in step.outputs:
                first = self._next.get(output.request_id, 0)
                self._next[output.request_id] = first + len(output.new_token_ids)
                self._deliver(self.replica_id, first, output)
                if output.finished:
                    del self._next[output.request_id]
                    finished.append(output.request_id)
        if finished:
            self.llumlet.finished(finished)
