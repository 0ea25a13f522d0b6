"""Serve's controller in virtual time: it starts and stops instances as the scaling policy says."""

import asyncio
import time
from collections.abc import Callable

from deployments.messages import Report
from deployments.policy.global_scheduler import GlobalScheduler
from deployments.policy.load import InstanceLoad
from deployments.policy.scaling import Period, ScalingRule, scale
from load_tests.simulator.instance import VirtualInstance

LOOK_S = 1.0
"""As often as replicas tell Serve what the policy looks at."""

FIRST_S = 100.0
"""Until the first decision, as in the paper's artifact: a fleet that begins empty would shrink to
nothing, while requests are already coming."""


class Controller:
    """All instances that are there and paid for.

    `make`: an instance of that id, up at once. `load_s`: what it takes until one is up. `rule`:
    None, where their number stays as it is.
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

    async def _scale(self, rule: ScalingRule, period: Period) -> Period:
        up = [one for one in self.instances.values() if one and not one.llumlet.draining]
        demands = await asyncio.gather(*(instance.llumlet.demand() for instance in up))
        starting = sum(instance is None for instance in self.instances.values())
        present = len(up) + starting
        now = time.monotonic()
        wanted, period = scale(demands, starting, present, period, now, rule)
        for _ in range(wanted - present):
            self._start(now)
        # As Serve does; a policy cannot name the one that is to stop.
        newest = reversed(up)
        for _ in range(present - wanted):
            next(newest).llumlet.drain(True)
        return period

    def _start(self, now: float) -> None:
        replica_id = self._new()
        self._scheduler.report(Report(InstanceLoad(replica_id, "starting")), now)
        asyncio.get_running_loop().call_later(self._load_s, self._up, replica_id)

    def _new(self) -> str:
        replica_id = f"i{self._made:04}"
        self._made += 1
        self.instances[replica_id] = None
        return replica_id

    def _up(self, replica_id: str) -> None:
        self.instances[replica_id] = self._make(replica_id)

    def _release(self) -> None:
        """Let go of what has nothing left to do."""
        for replica_id, instance in list(self.instances.items()):
            if instance and instance.llumlet.draining and instance.empty:
                instance.stop()
                del self.instances[replica_id]
