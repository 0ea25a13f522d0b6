"""Which replicas are lost or hang, as far as one ingress can tell.

Whatever a replica's step thread sends shows that it lives. One that has been quiet is asked: its
answer says since when the present step has been running, which is when the engine was last alive.
"""

from collections.abc import Iterable, Iterator

QUIET_S = 1.0
"""A replica that has work and said nothing for so long is asked how it is."""

LOST_S = 30.0
"""A lost replica is avoided for so long; by then Serve's routers do not know it any more."""

LATE_S = 1.0
"""What is heard of a lost replica after so long was not on its way: it lives, but for one call."""


class Vitals:
    """By replica id; `hanging` ones come back when they speak. All times are monotonic seconds."""

    def __init__(self, hang_s: float) -> None:
        self._hang_s = hang_s
        self._alive_at: dict[str, float] = {}
        self.hanging: set[str] = set()
        self._lost_at: dict[str, float] = {}

    def heard(self, replica_id: str, now: float, step_s: float = 0.0) -> None:
        """It spoke. `step_s`: how long its present step has taken."""
        if now - self._lost_at.get(replica_id, now) > LATE_S:
            del self._lost_at[replica_id]
        self._alive_at[replica_id] = max(now - step_s, self._alive_at.get(replica_id, 0.0))
        if step_s < self._hang_s:
            self.hanging.discard(replica_id)

    def lost(self, replica_id: str, now: float) -> None:
        """Its process is gone, or its engine."""
        self._alive_at.pop(replica_id, None)
        self.hanging.discard(replica_id)
        self._lost_at[replica_id] = now

    def avoid(self, now: float) -> frozenset[str]:
        """No request should go there."""
        self._lost_at = {k: at for k, at in self._lost_at.items() if now - at < LOST_S}
        return frozenset((*self.hanging, *self._lost_at))

    def gone(self, now: float) -> set[str]:
        """From where requests should be taken away, if they have not noticed themselves."""
        return self.hanging.union(k for k, at in self._lost_at.items() if now - at > LATE_S)

    def watch(self, places: Iterable[str], now: float) -> list[str]:
        """Look after the replicas that have work of ours. Answers those found to hang just now."""
        watched = {*places, *self.hanging} - self._lost_at.keys()
        self._alive_at = {each: self._alive_at.get(each, now) for each in watched}
        silent = {each for each, at in self._alive_at.items() if now - at > self._hang_s}
        found = sorted(silent - self.hanging)
        self.hanging |= silent
        return found

    def quiet(self, now: float) -> Iterator[str]:
        """The replicas under watch that should be asked how they are."""
        return (each for each, at in self._alive_at.items() if now - at > QUIET_S)

    def overslept(self, now: float) -> None:
        """This very process stood still: what was not heard meanwhile proves nothing."""
        self._alive_at = dict.fromkeys(self._alive_at, now)
