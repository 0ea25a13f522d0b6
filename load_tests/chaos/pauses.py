"""How long streams stood still because their instance was lost, and what a prefill would take."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from load_tests.chaos.faults import Event, Kind
from load_tests.chaos.streams import Stream

SLACK_S = 0.5
"""A token that was on its way when its instance was lost may arrive so much later."""


@dataclass(frozen=True, slots=True)
class Pause:
    """The longest pause of a stream that was recovered.

    `kind`: of the fault that it fell into; None where there was none. `recovered_s`: what the
    ingress says, of all its recoveries. `prefill_s`: what computing the KV of as many tokens took
    on the idle fleet.
    """

    kind: Kind | None
    seconds: float
    recovered_s: float
    recoveries: int
    tokens: int
    prefill_s: float


@dataclass(frozen=True, slots=True)
class Prefills:
    """Seconds of prefills by length, measured at some lengths; between these on a line."""

    tokens: Sequence[int]
    seconds: Sequence[float]

    def at(self, tokens: int) -> float:
        """Seconds for a prompt of so many tokens; of the nearest length outside of those known."""
        after = bisect_left(self.tokens, tokens)
        if after == 0 or after == len(self.tokens):
            return self.seconds[min(after, len(self.tokens) - 1)]
        (low, high), (fast, slow) = (
            (values[after - 1], values[after]) for values in (self.tokens, self.seconds)
        )
        return fast + (slow - fast) * (tokens - low) / (high - low)


def of_stream(
    stream: Stream, told: Mapping[str, Any], events: Sequence[Event], prefills: Prefills
) -> Pause | None:
    """`told`: what the admin API said of the request. None where it was not recovered."""
    if not told.get("recoveries") or not stream.arrivals:
        return None
    number, since, until = stream.longest_gap()
    tokens = stream.prompt_tokens + number
    return Pause(
        _fault(told["replicas"], since, until, events),
        until - since,
        told["recovered_ms"] / 1e3,
        told["recoveries"],
        tokens,
        prefills.at(tokens),
    )


def _fault(
    replicas: Sequence[str], since: float, until: float, events: Sequence[Event]
) -> Kind | None:
    """The last fault in a gap that hit an instance which had the request."""
    hits = [
        event.kind
        for event in events
        if since - SLACK_S <= event.at <= until and not set(replicas).isdisjoint(event.victims)
    ]
    return hits[-1] if hits else None
