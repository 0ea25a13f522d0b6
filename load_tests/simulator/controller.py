"""Serve's controller in virtual time: it starts and stops instances as the scaling policy says."""

import asyncio
import time
from collections.abc import Callable

from deployments.messages import Report
from deployments.policy.global_scheduler import GlobalScheduler
from deployments.policy.load import InstanceLoad
from deployments.policy.scaling import Demand, Period, ScalingRule, scale
from load_tests.simulator.instance import VirtualInstance

LOOK_S = 1.0
"""As often as replicas tell Serve what the policy looks at."""

FIRST_S = 100.0
"""Until the first decision, as in the paper's artifact: a fleet that begins empty would shrink to
nothing, while requests are already coming."""


class Controller:
    """All instances that are there and paid for.

    `make`: an instance of that id, up at once. `load_s`: what it takes until one is up. `rule`:
    None, where their number stays as it is; there are as many GPUs as its most instances.
    """

    def __init__(
        self,
        make: Callable[[str], VirtualInstance],
        scheduler: GlobalScheduler,
        rule: ScalingRule | None,
        load_s: float,
    ) -> None:
        self._make = make
        self._scheduler = scheduler
        self._rule = rule
        self._load_s = load_s
        self._made = 0
        self._unplaced = 0
        """Instances that are wanted, but have no GPU yet: others still drain there."""
        self._loading: dict[str, asyncio.TimerHandle] = {}
        self.instances: dict[str, VirtualInstance | None] = {}
        """By id, the oldest first; None while it loads its model."""

    def begin(self, count: int) -> None:
        """The fleet's first instances, which are up."""
        for _ in range(count):
            self._up(self._new())

    async def run(self) -> None:
        """Start and stop some, for ever."""
        if self._rule is None:
            return
        await asyncio.sleep(FIRST_S)
        period = Period(time.monotonic())
        while True:
            await asyncio.sleep(LOOK_S)
            self._release()
            period = await self._scale(self._rule, period)
            self._place(self._rule.max)

    async def _scale(self, rule: ScalingRule, period: Period) -> Period:
        up = [one for one in self.instances.values() if one and not one.llumlet.draining]
        starting = len(self._loading) + self._unplaced
        present = len(up) + starting
        loads = await asyncio.gather(*(instance.llumlet.load() for instance in up))
        demands = [Demand.of(load) for load in loads]
        wanted, period = scale(demands, starting, present, period, time.monotonic(), rule)
        self._unplaced += max(0, wanted - present)
        for _ in range(present - wanted):
            self._stop_one(up)
        return period

    def _stop_one(self, up: list[VirtualInstance]) -> None:
        """As Serve does, whose policy cannot name it: one that is not up, or else the newest."""
        if self._unplaced:
            self._unplaced -= 1
        elif self._loading:
            replica_id, timer = self._loading.popitem()
            timer.cancel()
            del self.instances[replica_id]
        else:
            up.pop().llumlet.retire()

    def _place(self, gpus: int) -> None:
        while self._unplaced and len(self.instances) < gpus:
            self._unplaced -= 1
            replica_id = self._new()
            report = Report(InstanceLoad(replica_id, "starting"))
            self._scheduler.report(report, time.monotonic())
            timer = asyncio.get_running_loop().call_later(self._load_s, self._up, replica_id)
            self._loading[replica_id] = timer

    def _new(self) -> str:
        replica_id = f"i{self._made:04}"
        self._made += 1
        self.instances[replica_id] = None
        return replica_id

    def _up(self, replica_id: str) -> None:
        self._loading.pop(replica_id, None)
        self.instances[replica_id] = self._make(replica_id)

    def _release(self) -> None:
        """Let go of what has nothing left to do."""
        for replica_id, instance in list(self.instances.items()):
            if instance and instance.llumlet.draining and instance.empty:
                instance.stop()
                del self.instances[replica_id]
