"""Choice of the request that leaves an instance (Llumnix, OSDI'24, §4.4.2)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Movable:
    """A request that could migrate now. `priority`: vLLM's, lower is more urgent.

    `blocks`: KV blocks that it would take at the destination; `frees`: those that it holds here;
    `arrived`: at its ingress, in Unix seconds.
    `stays`: it leaves only where blocks are lacking.
    """

    request_id: str
    priority: int
    tokens: int
    blocks: int
    frees: int
    arrived: float
    stays: bool = False

    @property
    def waiting(self) -> bool:
        """Whether it has not begun to run here."""
        return self.frees == 0


def choose_request(
    movable: Sequence[Movable],
    room: float,
    deficit: int,
    before: tuple[float, float] = (math.inf, math.inf),
) -> str | None:
    """Lower execution priority first, then the shorter one: it is cheapest to move.

    `movable` has those that wait in the order of their queue. Requests that wait hold no memory: to
    move one costs nothing and relieves the queue, so they go before running ones of the same
    priority.

    Beyond the paper: only what fits into the destination's `room`, in blocks, is chosen, and of
    those that wait only what comes `before` that (priority, arrival), and so waits no more. Where
    `deficit` blocks are lacking here, for the head of line or for those that run to go on, the
    shortest that leaves as many goes, or else the largest: short ones would have to be many.
    Where none are lacking, those with headroom stay: others make way for them here, and would have
    to anew wherever they went.
    """
    leaving = [request for request in movable if deficit > 0 or not request.stays]
    fitting = [
        request
        for request in leaving
        if request.blocks <= room
        and (not request.waiting or (request.priority, request.arrived) < before)
    ]
    if not fitting:
        return None
    least = max(request.priority for request in fitting)
    fitting = [request for request in fitting if request.priority == least]
    waiting = [request for request in fitting if request.waiting]
    enough = [request for request in fitting if request.frees >= deficit]
    if waiting:
        return waiting[0].request_id
    if enough:
        return min(enough, key=_length).request_id
    return max(fitting, key=_length).request_id


def _length(request: Movable) -> tuple[int, str]:
    return request.tokens, request.request_id
