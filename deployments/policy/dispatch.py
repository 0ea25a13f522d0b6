"""Choice of the instance for a new request. Every policy is a function of the loads alone."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Self

from deployments.messages import Ask
from deployments.policy.load import InstanceLoad, freeness

DispatchPolicy = Callable[[Sequence[InstanceLoad], random.Random, int], InstanceLoad]
"""(candidates, never empty and always in the same order; randomness; number of requests dispatched
so far) -> the chosen one."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A request that was dispatched to an instance and is not in its reports yet.

    `headroom_blocks`: those of its class.
    """

    blocks: int
    priority_class: str = "normal"
    headroom_blocks: int = 0

    @classmethod
    def of(cls, ask: Ask, block_size: int) -> Self:
        """The request of `ask`, where a KV block has `block_size` tokens."""
        blocks = -(-ask.prompt_tokens // block_size)
        headroom_blocks = -(-ask.headroom_tokens // block_size)
        return cls(blocks, ask.priority_class, headroom_blocks)


def with_pending(load: InstanceLoad, pending: Sequence[Pending]) -> InstanceLoad:
    """The load as it will be once `pending` have arrived.

    Without this a burst between two reports would all go to one instance. What fits joins the batch
    with its whole prompt; from the first that does not fit, it queues.
    """
    if not pending:
        return load
    headroom = {p.priority_class: p.headroom_blocks for p in pending if p.headroom_blocks}
    headroom |= load.headroom_blocks
    free = load.blocks_total - load.blocks_used
    used, running, waiting = load.blocks_used, load.running, load.waiting
    head, due = load.head_of_line_blocks, load.due_blocks
    for request in pending:
        if waiting == 0 and request.blocks <= free:
            free -= request.blocks
            used += request.blocks
            running += 1
        else:
            waiting += 1
            head = head or request.blocks
            due += request.blocks
    # A full batch is in the reported freeness only: keep that difference.
    reported = load.blocks_total - load.freeness * max(1, load.running + bool(load.waiting))
    extra = reported - load.blocks_used - load.head_of_line_blocks - load.headroom
    usage = used + head + sum(headroom.values()) + extra
    return replace(
        load,
        blocks_used=used,
        running=running,
        waiting=waiting,
        head_of_line_blocks=head,
        head_of_line_since=load.head_of_line_since if load.waiting else math.inf,
        due_blocks=due,
        headroom_blocks=headroom,
        staying=load.staying + sum(p.headroom_blocks > 0 for p in pending),
        freeness=freeness(load.blocks_total, usage, running, waiting),
    )


def by_freeness(loads: Sequence[InstanceLoad], rng: random.Random, turn: int) -> InstanceLoad:
    """The freest instance (paper §4.4.1); ties go to the shorter queue, then by turn.

    A new request joins the end of the queue, so here all of it counts, as in the paper's artifact;
    freeness proper, by which requests move, counts the head of line alone.

    Beyond the paper, headroom yields where no instance has a block left besides it.
    """
    freest = max(_turned(loads, turn), key=lambda load: (load.freeness_at_the_end, -load.waiting))
    if freest.freeness_at_the_end > 0:
        return freest
    yielding = (load for load in _turned(loads, turn) if load.headroom_blocks)
    return max((freest, *yielding), key=lambda load: load.freeness_without_headroom)


def by_room(loads: Sequence[InstanceLoad], rng: random.Random, turn: int) -> InstanceLoad:
    """The instance with the most blocks that its requests neither hold nor are about to take.

    For classes with headroom. Freeness would send them where few requests run, however large, and
    not where headroom is kept for them; but how fast they are depends on what the whole batch holds
    and on the prompts before theirs, and all of that is least where others of their class are.
    """
    return max(_turned(loads, turn), key=_room)


def by_queue(loads: Sequence[InstanceLoad], rng: random.Random, turn: int) -> InstanceLoad:
    """The instance with the fewest requests, whatever their size."""
    return min(_turned(loads, turn), key=lambda load: load.running + load.waiting)


def by_power_of_two(loads: Sequence[InstanceLoad], rng: random.Random, turn: int) -> InstanceLoad:
    """The less loaded of two instances drawn at random (Ray Serve's default rule)."""
    drawn = rng.sample(list(loads), min(2, len(loads)))
    return min(drawn, key=lambda load: load.running + load.waiting)


def round_robin(loads: Sequence[InstanceLoad], rng: random.Random, turn: int) -> InstanceLoad:
    """Each instance in its turn."""
    return loads[turn % len(loads)]


POLICIES: dict[str, DispatchPolicy] = {
    "freeness": by_freeness,
    "queue": by_queue,
    "power_of_two": by_power_of_two,
    "round_robin": round_robin,
}


def choose(
    policy: str,
    loads: Sequence[InstanceLoad],
    rng: random.Random,
    turn: int,
    keeps_headroom: bool = False,
) -> InstanceLoad | None:
    """Apply `policy` to the instances that take new requests; None where there is none.

    `keeps_headroom`: the request is of a class with headroom, to which `freeness` gives room.
    """
    candidates = [load for load in loads if load.state == "running"]
    rule = by_room if policy == "freeness" and keeps_headroom else POLICIES[policy]
    return rule(candidates, rng, turn) if candidates else None


def _room(load: InstanceLoad) -> int:
    return load.blocks_total - load.blocks_used - load.due_blocks


def _turned(loads: Sequence[InstanceLoad], turn: int) -> Iterator[InstanceLoad]:
    """Beginning with another one each turn, so that equals take turns."""
    start = turn % len(loads)
    yield from islice(loads, start, None)
    yield from islice(loads, start)
