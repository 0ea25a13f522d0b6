"""The Scheduler deployment: the global scheduler behind a Serve handle, one replica."""

import random
import time

from deployments.messages import Ask, Decision, FleetView, Orders, Report
from deployments.policy.global_scheduler import GlobalScheduler
from deployments.policy.pairing import PairingRule


class Scheduler:
    """Requests never wait for it: routers decide by themselves while it is slow or gone."""

    def __init__(self, policy: str, rule: PairingRule | None) -> None:
        self._scheduler = GlobalScheduler(policy, rule, random.Random())

    async def report(self, report: Report) -> Orders:
        """An instance's load; the answer is its orders."""
        return self._scheduler.report(report, time.monotonic())

    async def choose(self, asks: list[Ask]) -> Decision:
        """Instances for new requests."""
        return self._scheduler.choose(asks, time.monotonic())

    async def view(self) -> FleetView:
        """The fleet as the admin API shows it."""
        return self._scheduler.view(time.monotonic())
