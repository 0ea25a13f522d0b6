"""Virtual usage and freeness of an instance (Llumnix, OSDI'24, Algorithm 1)."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

InstanceState = Literal["starting", "running", "draining"]


@dataclass(frozen=True)
class InstanceLoad:
    """What an instance tells about itself; all that the global scheduler ever sees of it.

    Blocks are KV blocks. `freeness` counts decode steps that the present batch can still make
    before memory runs out; it may be negative, and is -inf for a draining instance.
    `head_of_line_since`: when that request arrived at its ingress, in Unix seconds;
    `head_of_line_priority`: vLLM's, lower is more urgent.
    `due_blocks`: what its requests, those that wait included, still need for the tokens they have.
    `headroom_blocks`: what is kept free for each class of its requests that wants headroom;
    `staying`: how many requests of such classes there are.
    `emulation_drift`: share by which an emulated engine is slower than its profile.
    `fingerprint`: of its model and of how it runs; requests move among equal ones only.
    """

    replica_id: str
    state: InstanceState
    blocks_total: int = 0
    blocks_used: int = 0
    block_size: int = 1
    running: int = 0
    waiting: int = 0
    head_of_line_blocks: int = 0
    head_of_line_since: float = 0.0
    head_of_line_priority: int = 0
    freeness: float = 0.0
    migrating_in: int = 0
    migrating_out: int = 0
    emulation_drift: float = 0.0
    fingerprint: str = ""
    due_blocks: int = 0
    headroom_blocks: Mapping[str, int] = field(default_factory=dict)
    staying: int = 0

    @property
    def headroom(self) -> int:
        """Blocks kept free for all classes together."""
        return sum(self.headroom_blocks.values())

    @cached_property  # for that it has no slots: a decision looks at it on all instances
    def freeness_at_the_end(self) -> float:
        """Freeness once all that is due, of requests in prefill and in the queue, is held.

        Where that is more than there is, the blocks that are lacking: shared out among ever more
        requests they would look fewer.
        """
        return self._at_the_end(given_up=0)

    @property
    def freeness_without_headroom(self) -> float:
        """The same if nothing were kept free for anybody."""
        return self._at_the_end(given_up=self.headroom)

    def _at_the_end(self, given_up: int) -> float:
        batch = max(1, self.running + bool(self.waiting))
        free = self.freeness * batch + given_up - (self.due_blocks - self.head_of_line_blocks)
        return free / max(1, self.running + self.waiting) if free > 0 else free


def headroom_of(classes: Iterable[str], headroom_blocks: Mapping[str, int]) -> dict[str, int]:
    """What is kept free for each class of an instance's requests that wants headroom.

    The paper's requests share their class's headroom, h / n each, which sums to the whole of it
    however many there are. Beyond the paper, those that wait count: room is made before they run.
    """
    return {name: headroom_blocks[name] for name in set(classes) if headroom_blocks.get(name)}


def virtual_usage(
    blocks_used: int,
    blocks_free: int,
    head_of_line_blocks: int,
    batch_is_full: bool,
    headroom_blocks: int,
    draining: bool,
) -> float:
    """Sum of the virtual usages of an instance's requests, in blocks.

    A running request counts what it holds plus its share of its class's headroom: `headroom_blocks`
    is the sum of these (`headroom_of`). The request at the head of the queue counts its demand, the
    rest of the queue nothing; a draining instance carries the paper's infinite fake request.

    Beyond the paper, whose engine knew no limit but memory: a head of line that waits for a place
    in a full batch cannot use the free blocks, so they are no more free than used ones.
    """
    if draining:
        return math.inf
    unreachable = blocks_free if batch_is_full and head_of_line_blocks else 0
    return blocks_used + headroom_blocks + head_of_line_blocks + unreachable


def freeness(blocks_total: int, usage: float, running: int, waiting: int) -> float:
    """F = (M - sum of V) / B: decode steps left for a batch of B requests holding `usage` blocks.

    The head of line joins the batch as soon as it can, so it counts in B; an idle instance counts
    as a batch of one.
    """
    batch = running + (1 if waiting else 0)
    return (blocks_total - usage) / max(1, batch)
