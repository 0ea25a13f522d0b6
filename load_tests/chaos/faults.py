"""What can happen to a fleet, and in which order it does: all drawn from a seed."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "kill",
    "source",
    "destination",
    "both ends",
    "short hang",
    "long hang",
    "burst",
    "scheduler",
    "ingress",
]
"""What happens: an instance is killed; the source, the destination or both ends of a move that is
on its way are; an instance is stopped (SIGSTOP) and goes on before or after it is given up; more
requests come than the fleet has memory for; the Scheduler or an ingress is killed.
"""

TAKES: dict[Kind, int] = {
    "kill": 1,
    "source": 1,
    "destination": 1,
    "both ends": 2,
    "short hang": 1,
    "long hang": 1,
}
"""Instances that are away then; the others take none."""

HANGS: dict[Kind, tuple[float, float]] = {"short hang": (2.0, 3.5), "long hang": (8.0, 20.0)}
"""Seconds, at least and at most."""

JITTER = 0.3
"""Faults do not come like a clock: each may come so much of the interval sooner or later."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One that is planned. `after_s`: seconds since the last one; `hang_s`: for so long it stops.

    `pick`: from 0 to 1, which of those it could hit. Their names differ from run to run, so two
    runs of a seed have the same faults, but not the same victims.
    """

    kind: Kind
    after_s: float
    pick: float
    hang_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Event:
    """A fault that happened. `at`: seconds of time.perf_counter.

    `victims`: replica ids of the instances, or the deployment of what else was killed.
    """

    at: float
    kind: Kind
    victims: tuple[str, ...] = ()
    hang_s: float = 0.0

    @property
    def killed(self) -> tuple[str, ...]:
        """The victims that did not live."""
        return () if self.hang_s else self.victims


def plan(deck: Sequence[Kind], every_s: float, seed: int) -> Iterator[Fault]:
    """For ever: the deck is dealt out, each time in another order."""
    rng = random.Random(f"faults/{seed}")
    while True:
        for kind in rng.sample(deck, len(deck)):
            after_s = every_s * rng.uniform(1 - JITTER, 1 + JITTER)
            hang_s = rng.uniform(*HANGS.get(kind, (0.0, 0.0)))
            yield Fault(kind, after_s, rng.random(), hang_s)


def picked(candidates: Sequence[str], pick: float, count: int = 1) -> tuple[str, ...]:
    """`count` neighbours of the candidates, as `Fault.pick` says."""
    ordered = sorted(candidates)
    first = int(pick * len(ordered))
    return tuple(ordered[(first + step) % len(ordered)] for step in range(count))
