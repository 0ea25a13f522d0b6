"""The global scheduler's state and decisions (Llumnix, OSDI'24, §4.4), without any transport.

Soft state: all of it comes back with the instances' next reports.
"""

import random
from collections import Counter
from collections.abc import Sequence

from deployments.messages import Ask, Decision, FleetView, Orders, Report
from deployments.policy import dispatch
from deployments.policy.dispatch import Pending
from deployments.policy.load import InstanceLoad
from deployments.policy.pairing import PairingRule, pair

PAIRING_INTERVAL_S = 0.05
SILENT_S = 5.0
"""A running instance that does not report for this long is taken for dead."""

STARTING_S = 600.0
"""A starting one says so once, then loads its model."""

PENDING_S = 5.0
"""A dispatched request that is not reported by then never arrived."""


class GlobalScheduler:
    """Sees loads only; chooses instances for new requests, and pairs instances for migration."""

    def __init__(self, policy: str, rule: PairingRule | None, rng: random.Random) -> None:
        self._policy = policy
        self._rule = rule
        self._rng = rng
        self._loads: dict[str, tuple[float, InstanceLoad]] = {}
        self._migrations: dict[str, dict[str, int]] = {}
        self._pending: dict[str, dict[str, tuple[float, Pending]]] = {}
        self._turn = 0
        self._pairs: dict[str, str] = {}
        self._paired_at = float("-inf")

    def report(self, report: Report, now: float) -> Orders:
        """Take in an instance's load; the answer is where it should hand requests over to."""
        load = report.load
        known = self._loads.get(load.replica_id)
        if load.state == "starting" and known is not None:
            return Orders()  # its first word came late
        self._loads[load.replica_id] = (now, load)
        self._migrations[load.replica_id] = report.migrations
        pending = self._pending.setdefault(load.replica_id, {})
        for request_id in report.arrived:
            pending.pop(request_id, None)
        return Orders(self._pairing(now).get(load.replica_id))

    def choose(self, asks: Sequence[Ask], now: float) -> Decision:
        """Choose an instance for each request, each choice counted before the next is made."""
        self._forget_silent(now)
        chosen: list[str | None] = []
        for ask in asks:
            best = dispatch.choose(self._policy, self._expected(now), self._rng, self._turn)
            self._turn += 1
            chosen.append(best.replica_id if best else None)
            if best:
                blocks = -(-ask.prompt_tokens // best.block_size)
                arrivals = self._pending.setdefault(best.replica_id, {})
                arrivals[ask.request_id] = (now, Pending(blocks))
        return Decision(tuple(chosen), tuple(self._expected(now)))

    def view(self, now: float) -> FleetView:
        """Last loads, and the migrations counted by all instances ever seen."""
        self._forget_silent(now)
        counts: Counter[str] = Counter()
        for of_instance in self._migrations.values():
            counts.update(of_instance)
        loads = tuple(load for _, load in self._loads.values())
        return FleetView(loads, dict(counts))

    def _expected(self, now: float) -> list[InstanceLoad]:
        """The loads with what is on its way counted in."""
        expected = []
        for replica_id, (_, load) in self._loads.items():
            pending = self._pending.get(replica_id, {})
            for request_id in [r for r, (at, _) in pending.items() if now - at > PENDING_S]:
                del pending[request_id]
            expected.append(dispatch.with_pending(load, [p for _, p in pending.values()]))
        return expected

    def _pairing(self, now: float) -> dict[str, str]:
        if self._rule is not None and now - self._paired_at >= PAIRING_INTERVAL_S:
            self._forget_silent(now)
            self._pairs = pair(self._expected(now), self._rule)
            self._paired_at = now
        return self._pairs

    def _forget_silent(self, now: float) -> None:
        for replica_id, (at, load) in list(self._loads.items()):
            if now - at > (STARTING_S if load.state == "starting" else SILENT_S):
                del self._loads[replica_id]
                self._pending.pop(replica_id, None)
