"""Pairing of migration sources with destinations (Llumnix, OSDI'24, §4.4.2)."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from deployments.policy.load import InstanceLoad


@dataclass(frozen=True, slots=True)
class PairingRule:
    """Freeness thresholds, in decode steps: sources lie under one, destinations over the other.

    `min_gain`: a destination ends up freer than its source was, by at least this much. So the least
    freeness of the two rises with each move, and no move is ever worth taking back.
    `at_once`: most destinations that a draining instance has at the same time.
    """

    out_threshold: float
    in_threshold: float
    min_gain: float
    at_once: int = 1


@dataclass(frozen=True, slots=True)
class Target:
    """Where an instance hands requests over to, and the KV blocks that one may take there.

    `before`: (vLLM's priority, Unix seconds of arrival) of a head of line there that lacks blocks.
    One that waits here goes there only if it comes before that; or it would wait there as well.
    """

    replica_id: str
    room: float
    before: tuple[float, float] = (math.inf, math.inf)


Pair = tuple[str, tuple[Target, ...]]


def pair(loads: Sequence[InstanceLoad], rule: PairingRule) -> dict[str, tuple[Target, ...]]:
    """Source id -> targets: the least free with the freest, the next with the next.

    Every instance is in one pair at most, but draining ones have several targets, and share them.
    The global scheduler never names requests: a source's llumlet chooses them, and goes on until a
    later pass no longer pairs it. Requests stay among instances that run the same model in the same
    way.
    """
    pairs: dict[str, tuple[Target, ...]] = {}
    for alike in _alike(loads):
        for step in (_evacuate, _balance, _lend, _squeeze):
            taken = {*pairs, *(target.replica_id for to in pairs.values() for target in to)}
            rest = [load for load in alike if load.replica_id not in taken]
            pairs |= dict(step(rest, rule))
    return pairs


def _alike(loads: Sequence[InstanceLoad]) -> Iterable[list[InstanceLoad]]:
    groups: dict[str, list[InstanceLoad]] = {}
    for load in loads:
        groups.setdefault(load.fingerprint, []).append(load)
    return groups.values()


def _evacuate(loads: Sequence[InstanceLoad], rule: PairingRule) -> Iterator[Pair]:
    """Draining instances empty themselves, however crowded the others are already.

    All that is kept free at a destination is more than one step for each request: nobody is
    preempted for it. The roomiest come first, or a large request might never be offered one; but
    before those whose head of line waits for blocks.
    """
    leaving = sorted((x for x in loads if _is_draining(x) and _has_work(x)), key=_by(_used))
    takers = sorted((x for x in loads if x.state == "running"), key=_by(lambda x: -_left(x)))
    takers.sort(key=lambda x: not _fits(x))
    targets = deque(Target(x.replica_id, _left(x)) for x in takers if _left(x) > 0)
    if not targets:
        return
    for source in leaving:
        yield source.replica_id, tuple(islice(targets, rule.at_once))
        targets.rotate(-1)  # the next one begins with another


def _balance(loads: Sequence[InstanceLoad], rule: PairingRule) -> Iterator[Pair]:
    """The paper's: every source gains freeness.

    A destination is kept for the source that needs it most even while none of its requests fits
    there: left to the next one, it would never have the room.

    Beyond the paper, those with headroom that lack no blocks at once come last, however little they
    have besides. Or they would give back what they have lent (`_lend`) while others still need it,
    and would lend it to these.
    """
    by_freeness = sorted(
        (x for x in loads if x.state == "running"), key=_by(lambda load: load.freeness)
    )
    sources = [x for x in by_freeness if x.freeness < rule.out_threshold and _may_give(x)]
    sources.sort(key=_may_lend)
    takers = [x for x in by_freeness if x.freeness > rule.in_threshold and _fits(x)]
    giving: set[str] = set()
    for source in sources:
        while takers and takers[-1].replica_id in giving:
            takers.pop()
        if not takers:
            return
        if takers[-1].freeness - source.freeness > rule.min_gain:
            taker = takers.pop()
            giving.add(source.replica_id)
            yield source.replica_id, (Target(taker.replica_id, _room(taker, source, rule)),)


def _lend(loads: Sequence[InstanceLoad], rule: PairingRule) -> Iterator[Pair]:
    """Beyond the paper: headroom yields, as in dispatch, where `_balance` leaves no destination.

    It is lent to those that would be preempted or wait meanwhile. `_balance` gives it back: who
    lends is short of freeness, and is paired again once there is room elsewhere.
    """
    running = [load for load in loads if load.state == "running"]
    lenders = [x for x in running if _may_lend(x) and _spare(x, rule) > 0]
    lenders.sort(key=_by(lambda load: -_spare(load, rule)))
    for source, lender in zip((*_starving(running), *_blocked(running)), lenders, strict=False):
        yield source.replica_id, (Target(lender.replica_id, _spare(lender, rule)),)


def _squeeze(loads: Sequence[InstanceLoad], rule: PairingRule) -> Iterator[Pair]:
    """Beyond the paper, whose moves end when no instance is over the threshold.

    Then most have a head of line that their free blocks are too few for, and all of these lie idle:
    those of the instance whose head of line is the last in turn are of use to others. First to one
    that is about to preempt; then to the one whose head of line is the first in turn, until it
    fits: what is free in pieces becomes free in one place. It cannot go back and forth, because
    nobody comes before the first, and no request waits for ever. Of those that wait, only what
    comes before the taker's head of line goes along.
    """
    running = [load for load in loads if load.state == "running" and load.running]
    starving, blocked = _starving(running), _blocked(running)
    takers = [x for x in reversed(blocked) if _spare(x, rule) > 0]
    paired: set[str] = set()
    for source, taker in zip((*starving, *blocked), takers, strict=False):
        if source is taker or not paired.isdisjoint((source.replica_id, taker.replica_id)):
            return
        paired |= {source.replica_id, taker.replica_id}
        yield source.replica_id, (Target(taker.replica_id, _spare(taker, rule), _turn(taker)),)


def _starving(loads: Sequence[InstanceLoad]) -> list[InstanceLoad]:
    """Those that are about to preempt, the one with the fewest free blocks first."""
    return sorted((load for load in loads if _is_starving(load)), key=_by(_free))


def _blocked(loads: Sequence[InstanceLoad]) -> list[InstanceLoad]:
    """The others whose head of line waits for blocks, in the order of their turns."""
    blocked = (load for load in loads if not _fits(load) and not _is_starving(load))
    return sorted(blocked, key=lambda load: (_turn(load), load.replica_id))


def _turn(load: InstanceLoad) -> tuple[float, float]:
    """When it is its head of line's turn, were there but one queue."""
    return load.head_of_line_priority, load.head_of_line_since


def _is_starving(load: InstanceLoad) -> bool:
    """Not every running request can have one more block: soon one of them is preempted."""
    return _free(load) < load.running


def _by(key: Callable[[InstanceLoad], float]) -> Callable[[InstanceLoad], tuple[float, str]]:
    return lambda load: (key(load), load.replica_id)


def _spare(load: InstanceLoad, rule: PairingRule) -> float:
    """Blocks that may go there in one request if nothing is kept free."""
    return _unclaimed(load) - rule.in_threshold * (load.running + 1)


def _room(taker: InstanceLoad, source: InstanceLoad, rule: PairingRule) -> float:
    """Blocks that may go there in one request: it must stay freer than the source was before."""
    freeness = max(rule.in_threshold, source.freeness + rule.min_gain)
    return _unclaimed(taker) - taker.headroom - freeness * (taker.running + 1)


def _unclaimed(load: InstanceLoad) -> int:
    """Free blocks but for those that its head of line is about to take."""
    return _free(load) - load.head_of_line_blocks if _fits(load) else _free(load)


def _left(load: InstanceLoad) -> int:
    """Blocks that may go there so that everyone there, the new one too, can have one more."""
    return _unclaimed(load) - (load.running + 2)


def _fits(load: InstanceLoad) -> bool:
    """Whether its head of line, if it has one, waits for anything else than blocks."""
    return _deficit(load) <= 0


def _deficit(load: InstanceLoad) -> int:
    """Blocks that its head of line waits for; 0 or less where it waits for none."""
    return load.head_of_line_blocks - _free(load)


def _free(load: InstanceLoad) -> int:
    return load.blocks_total - load.blocks_used


def _used(load: InstanceLoad) -> int:
    return load.blocks_used


def _is_draining(load: InstanceLoad) -> bool:
    return load.state == "draining"


def _has_work(load: InstanceLoad) -> bool:
    return load.running + load.waiting > 0


def _may_give(load: InstanceLoad) -> bool:
    """Whether a request may leave it (`choose_request`), or it would occupy a destination."""
    if load.running + load.waiting > load.staying:
        return True
    return _has_work(load) and _lacks_blocks(load)


def _may_lend(load: InstanceLoad) -> bool:
    """Whether it keeps blocks free that it does not need at once."""
    return load.headroom > 0 and not _lacks_blocks(load)


def _lacks_blocks(load: InstanceLoad) -> bool:
    return _is_starving(load) or not _fits(load)
