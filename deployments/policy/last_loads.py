"""What a router goes by while the Scheduler does not tell it: the loads that it saw last."""

import random
from collections.abc import Iterable, Sequence

from deployments.messages import Ask
from deployments.policy import dispatch
from deployments.policy.dispatch import Pending
from deployments.policy.load import InstanceLoad

LOADS_S = 10.0
"""Loads seen longer ago than this, in seconds, count no more: requests have come and gone since,
and what is only ever added to would send everything to one instance in the end.
"""


class LastLoads:
    """The instances' loads when the Scheduler last told them, and what was sent there since.

    The clock is the caller's, in seconds.
    """

    def __init__(self, policy: str, rng: random.Random) -> None:
        self._policy = policy
        self._rng = rng
        self._loads: dict[str, InstanceLoad] = {}
        self._seen_at = float("-inf")
        self._turn = 0

    def see(self, loads: Iterable[InstanceLoad], now: float) -> None:
        """The Scheduler's loads: all that is known from now on."""
        self._loads = {load.replica_id: load for load in loads}
        self._seen_at = now

    def not_draining(self, candidates: Sequence[str]) -> list[str]:
        """Those that are not known to drain."""
        draining = {name for name, load in self._loads.items() if load.state == "draining"}
        return [candidate for candidate in candidates if candidate not in draining]

    def choose(self, ask: Ask, candidates: Sequence[str], now: float) -> str:
        """The candidate for a request, which counts there from now on; in turn if none is known.

        One that drains is better than none: it may have stopped to, and nobody could say so.
        """
        if now - self._seen_at > LOADS_S:
            self._loads.clear()
        self._turn += 1
        candidates = self.not_draining(candidates) or candidates
        known = [load for load in self._loads.values() if load.replica_id in candidates]
        best = dispatch.choose(self._policy, known, self._rng, self._turn, ask.keeps_headroom)
        if best is None:
            return candidates[self._turn % len(candidates)]
        pending = Pending.of(ask, best.block_size)
        self._loads[best.replica_id] = dispatch.with_pending(best, [pending])
        return best.replica_id
