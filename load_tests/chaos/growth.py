"""Whether a fleet takes more and more of its machine."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from load_tests.chaos.processes import INGRESS, REPLICA, SCHEDULER, Usage, actors

WARM, WINDOW = 0.25, 0.15
"""Shares of a run: what is left out at its beginning, and how much the medians are taken over: a
burst is over sooner.
"""

ALLOWED = 0.10
SLACK = {"rss_mib": 60.0, "fds": 10.0, "threads": 6.0, "sockets": 10.0, "processes": 1.0}
"""A number may grow by a tenth or by this, whichever is more: memory does by malloc's habits alone,
and there may be a few more connections just now.
"""

ACTORS = "actors"

Sample = tuple[float, Mapping[str, Usage]]
"""Seconds from the start of the run, and what each role takes then."""


@dataclass(frozen=True, slots=True)
class Growth:
    """A number of one role, soon after the start and at the end."""

    role: str
    what: str
    before: float
    after: float

    @property
    def flat(self) -> bool:
        """Whether it grew no more than it may."""
        return self.after - self.before <= max(ALLOWED * self.before, SLACK[self.what])


def growth(samples: Sequence[Sample]) -> list[Growth]:
    """Of a process of each of our deployments, and the number of actors.

    A killed process is replaced by a new one: as long as that happens at a steady pace, they are as
    old on average at the end as they were before.
    """
    if not samples:
        return []
    end = samples[-1][0]
    early = _within(samples, WARM * end, (WARM + WINDOW) * end)
    late = _within(samples, (1 - WINDOW) * end, end)
    return [*_per_process(early, late), *_actors(early, late)]


def _within(samples: Sequence[Sample], since: float, until: float) -> list[Mapping[str, Usage]]:
    return [usage for at, usage in samples if since <= at <= until]


def _per_process(
    early: Sequence[Mapping[str, Usage]], late: Sequence[Mapping[str, Usage]]
) -> Iterator[Growth]:
    for role in (REPLICA, SCHEDULER, INGRESS):
        for what in ("rss_mib", "fds", "threads", "sockets"):
            before, after = (
                [getattr(at[role], what) / at[role].processes for at in window if role in at]
                for window in (early, late)
            )
            if before and after:
                yield Growth(role, what, statistics.median(before), statistics.median(after))


def _actors(
    early: Sequence[Mapping[str, Usage]], late: Sequence[Mapping[str, Usage]]
) -> Iterator[Growth]:
    before, after = ([actors(usage) for usage in window] for window in (early, late))
    if before and after:
        yield Growth(ACTORS, "processes", statistics.median(before), statistics.median(after))
