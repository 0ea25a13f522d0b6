"""Choice of the request that leaves an instance (Llumnix, OSDI'24, §4.4.2)."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Movable:
    """A request that could migrate now. `priority`: vLLM's, lower is more urgent."""

    request_id: str
    priority: int
    tokens: int
    waiting: bool


def choose_request(movable: Iterable[Movable]) -> str | None:
    """Lower execution priority first, then the shorter one: it is cheapest to move.

    Requests that wait hold no memory: to move one costs nothing and relieves the queue, so they go
    before running ones of the same priority.
    """
    ranked = sorted(movable, key=lambda r: (-r.priority, not r.waiting, r.tokens, r.request_id))
    return ranked[0].request_id if ranked else None
