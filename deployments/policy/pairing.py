"""Pairing of migration sources with destinations (Llumnix, OSDI'24, §4.4.2)."""

from collections.abc import Sequence
from dataclasses import dataclass

from deployments.policy.load import InstanceLoad


@dataclass(frozen=True, slots=True)
class PairingRule:
    """Freeness thresholds, in decode steps: sources lie under one, destinations over the other.

    `min_gain` is how much freer than the source a destination must be, so that two instances on
    either side of the thresholds do not exchange requests for nothing.
    """

    out_threshold: float
    in_threshold: float
    min_gain: float


def pair(loads: Sequence[InstanceLoad], rule: PairingRule) -> dict[str, str]:
    """Source id -> destination id: the least free with the freest, the next with the next.

    Every instance is in one pair at most. The global scheduler never names requests: a source's
    llumlet chooses them, and goes on until a later pass no longer pairs it.
    """
    sources = sorted(
        (x for x in loads if _has_work(x) and x.freeness < rule.out_threshold),
        key=lambda load: (load.freeness, load.replica_id),
    )
    taken = {load.replica_id for load in sources}
    destinations = sorted(
        (
            x
            for x in loads
            if x.state == "running"
            and x.freeness > rule.in_threshold
            and x.waiting == 0
            and x.replica_id not in taken
        ),
        key=lambda load: (-load.freeness, load.replica_id),
    )
    return {
        source.replica_id: destination.replica_id
        for source, destination in zip(sources, destinations, strict=False)
        if destination.freeness - source.freeness > rule.min_gain
    }


def _has_work(load: InstanceLoad) -> bool:
    return load.running + load.waiting > 0
