"""How many instances a fleet needs (Llumnix, OSDI'24, §4.4: auto-scaling)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deployments.policy.load import InstanceLoad


@dataclass(frozen=True, slots=True)
class ScalingRule:
    """Bounds on the number of instances, and on the fleet's mean freeness in decode steps.

    `period_s`: what the requests demand is averaged over this time before each decision.
    """

    min: int
    max: int
    freeness_low: float
    freeness_high: float
    period_s: float


@dataclass(frozen=True, slots=True)
class Demand:
    """What an instance that takes requests tells for scaling; one that drains has none of it.

    `blocks`: virtual usage in KV blocks, of the whole queue instead of its head alone, because an
    instance that is added serves all of it. `requests`: those that run and those that wait.
    """

    blocks_total: int
    blocks: float
    requests: int

    @staticmethod
    def of(load: InstanceLoad) -> "Demand":
        """From what the instance tells of its load."""
        if load.state != "running":
            return Demand(0, 0.0, 0)
        usage = load.blocks_total - load.freeness * max(1, load.running + bool(load.waiting))
        blocks = usage - load.head_of_line_blocks + load.due_blocks
        return Demand(load.blocks_total, blocks, load.running + load.waiting)


@dataclass(frozen=True, slots=True)
class Period:
    """What was demanded since `began`, summed up over `looks` at the fleet."""

    began: float
    looks: int = 0
    blocks: float = 0.0
    requests: float = 0.0

    def seen(self, demands: Sequence[Demand]) -> "Period":
        """With one more look."""
        return Period(
            self.began,
            self.looks + 1,
            self.blocks + sum(demand.blocks for demand in demands),
            self.requests + sum(demand.requests for demand in demands),
        )

    def blocks_for(self, freeness: float) -> float:
        """KV blocks in which the fleet has this freeness on average."""
        return (self.blocks + freeness * self.requests) / self.looks


def scale(
    demands: Sequence[Demand],
    starting: int,
    target: int,
    period: Period,
    now: float,
    rule: ScalingRule,
) -> tuple[int, Period]:
    """The number of instances that there should be, and the period to go on with.

    The mean freeness is one over requests, (sum of M - sum of V) / sum of B: over instances, a
    single idle one would lift it by its whole memory. What is demanded does not depend on the
    number of instances, so neither needs to be tried out: as many are added at once as bring
    freeness over `freeness_low`, and one is stopped where it is over `freeness_high` and would not
    fall under `freeness_low` for it. So a steady load comes to rest.

    Instances that are starting count where more are wanted, and never as idle: where one is stopped
    while others start, those that run are over `freeness_high` by themselves. So one that cannot
    start, for want of a GPU, does not keep the others from being stopped.
    """
    target = max(rule.min, min(rule.max, target))
    running = [demand for demand in demands if demand.blocks_total]
    if not running:
        return target, Period(now)
    period = period.seen(running)
    if now - period.began < rule.period_s:
        return target, period
    capacity = sum(demand.blocks_total for demand in running) / len(running)
    least = math.ceil(period.blocks_for(rule.freeness_low) / capacity)
    most = period.blocks_for(rule.freeness_high) / capacity
    change = max(0, least - len(running) - starting)
    if len(running) > max(most, least):
        change = -1
    return max(rule.min, min(rule.max, target + change)), Period(now)
