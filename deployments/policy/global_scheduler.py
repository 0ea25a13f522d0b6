"""The global scheduler's state and decisions (Llumnix, OSDI'24, §4.4), without any transport.

Soft state: all of it comes back with the instances' next reports.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence

from deployments.messages import Ask, Decision, FleetView, Orders, Report
from deployments.policy import dispatch
from deployments.policy.dispatch import Pending
from deployments.policy.load import InstanceLoad
from deployments.policy.pairing import PairingRule, Target, pair

PAIRING_INTERVAL_S = 0.05
SILENT_S = 5.0
"""A running instance that does not report for this long is taken for dead."""

STARTING_S = 600.0
"""A starting one says so once, then loads its model."""

PENDING_S = 5.0
"""A dispatched request that is not reported by then never arrived."""


COUNTED_MAX = 1000
"""Instances that are gone and may come back: so many are remembered, to count nothing twice."""

SWEEP_INTERVAL_S = 0.05
"""To look for what is silent or late takes time that grows with the fleet, and need not be often.
"""


class _Instance:
    """One instance's last report, and what was dispatched to it since."""

    def __init__(self, load: InstanceLoad, now: float) -> None:
        self.reported_load = self.load = load
        self._heard_at = now
        self._pending: dict[str, tuple[float, Pending]] = {}

    def reported(self, report: Report, now: float) -> None:
        """A new load; what is in it is no longer on its way."""
        for request_id in report.arrived:
            self._pending.pop(request_id, None)
        self.reported_load, self._heard_at = report.load, now
        self._count_pending()

    def dispatched(self, request_id: str, pending: Pending, now: float) -> None:
        """A request is on its way there."""
        self._pending[request_id] = (now, pending)
        self._count_pending()

    def expire(self, now: float) -> None:
        """Forget what was dispatched and never arrived."""
        late = [r for r, (at, _) in self._pending.items() if now - at > PENDING_S]
        for request_id in late:
            del self._pending[request_id]
        if late:
            self._count_pending()

    def is_silent(self, now: float) -> bool:
        """Whether it must be taken for dead."""
        patience = STARTING_S if self.reported_load.state == "starting" else SILENT_S
        return now - self._heard_at > patience

    def _count_pending(self) -> None:
        pending = [request for _, request in self._pending.values()]
        self.load = dispatch.with_pending(self.reported_load, pending)


class GlobalScheduler:
    """Sees loads only; chooses instances for new requests, and pairs instances for migration."""

    def __init__(self, policy: str, rule: PairingRule | None, rng: random.Random) -> None:
        self._policy = policy
        self._rule = rule
        self._rng = rng
        self._instances: dict[str, _Instance] = {}
        self._migrations: Counter[str] = Counter()
        self._counted: dict[str, Mapping[str, int]] = {}
        self._turn = 0
        self._pairs: dict[str, tuple[Target, ...]] = {}
        self._paired_at = float("-inf")
        self._swept_at = float("-inf")

    def report(self, report: Report, now: float) -> Orders:
        """Take in an instance's load; the answer is where it should hand requests over to."""
        load = report.load
        known = self._instances.get(load.replica_id)
        if load.state == "starting" and known is not None:
            return Orders()  # its first word came late
        if known is not None and load.state != known.reported_load.state:
            self._paired_at = float("-inf")  # one that drains is in a hurry
        if known is None:
            self._add(_Instance(load, now))
        else:
            known.reported(report, now)
        self._count(report)
        return self._orders(load.replica_id, now)

    def choose(self, asks: Sequence[Ask], now: float) -> Decision:
        """Choose an instance for each request, each choice counted before the next is made."""
        self._sweep(now)
        chosen = [self._choose(ask, now) for ask in asks]
        return Decision(tuple(chosen), tuple(self._expected()))

    def _choose(self, ask: Ask, now: float) -> str | None:
        alike = [
            load
            for load in self._expected()
            if load.fingerprint == ask.fingerprint and load.replica_id not in ask.avoid
        ]
        best = dispatch.choose(self._policy, alike, self._rng, self._turn, ask.keeps_headroom)
        self._turn += 1
        if best is None:
            return None
        pending = Pending.of(ask, best.block_size)
        self._instances[best.replica_id].dispatched(ask.request_id, pending, now)
        return best.replica_id

    def view(self, now: float) -> FleetView:
        """Last loads, and the migrations counted by all instances ever seen."""
        self._sweep(now)
        loads = tuple(instance.reported_load for instance in self._instances.values())
        return FleetView(loads, dict(self._migrations))

    def _count(self, report: Report) -> None:
        """Add what is new of an instance's counts, which may come back after it was silent."""
        name = report.load.replica_id
        before = self._counted.pop(name, {})
        self._migrations.update(
            {outcome: n - before.get(outcome, 0) for outcome, n in report.migrations.items()}
        )
        self._counted[name] = report.migrations
        if len(self._counted) > len(self._instances) + COUNTED_MAX:
            gone = next(known for known in self._counted if known not in self._instances)
            del self._counted[gone]

    def _add(self, instance: _Instance) -> None:
        """In the order of their ids, on which turns are taken."""
        self._instances[instance.reported_load.replica_id] = instance
        self._instances = dict(sorted(self._instances.items()))

    def _expected(self) -> list[InstanceLoad]:
        """The loads with what is on its way counted in, in the order of their ids."""
        return [instance.load for instance in self._instances.values()]

    def _orders(self, replica_id: str, now: float) -> Orders:
        if self._rule is None:
            return Orders()
        if now - self._paired_at >= PAIRING_INTERVAL_S:
            self._sweep(now)
            self._pairs = pair(self._expected(), self._rule)
            self._paired_at = now
        return Orders(self._pairs.get(replica_id, ()))

    def _sweep(self, now: float) -> None:
        if now - self._swept_at < SWEEP_INTERVAL_S:
            return
        self._swept_at = now
        for replica_id, instance in list(self._instances.items()):
            if instance.is_silent(now):
                del self._instances[replica_id]
            else:
                instance.expire(now)
