"""How long streams stood still because their instance was lost, and what a prefill would take."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from load_tests.chaos.faults import Event, Kind
from load_tests.chaos.streams import Gap, Stream

SLACK_S = 0.5
"""A token that was on its way when its instance was lost may arrive so much later."""


@dataclass(frozen=True, slots=True)
class Pause:
    """The longest pause of a recovered stream, at the time of a fault that hit an instance of its.

    `name`: of the stream; `since`: seconds of time.perf_counter. `kind`: of that fault; None where
    there was none. `noticed_s`: how much of it passed before the ingress knew, by its own account;
    None where a stream was recovered several times, which the ingress tells the sum of.
    `prefill_s`: what computing the KV of as many tokens took on the idle fleet.
    """

    name: str
    kind: Kind | None
    since: float
    seconds: float
    noticed_s: float | None
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
    if not told.get("recoveries"):
        return None
    found = list(_hits(stream, told["replicas"], events))
    if not found and (gap := stream.longest_gap()):
        found = [(None, gap)]
    if not found:
        return None
    kind, gap = max(found, key=lambda one: one[1].seconds)
    once = told["recoveries"] == 1
    noticed_s = max(0.0, gap.seconds - told["recovered_ms"] / 1e3) if once else None
    tokens = stream.prompt_tokens + gap.tokens
    prefill_s = prefills.at(tokens)
    return Pause(stream.name, kind, gap.since, gap.seconds, noticed_s, tokens, prefill_s)


def _hits(
    stream: Stream, replicas: Sequence[str], events: Sequence[Event]
) -> Iterator[tuple[Kind | None, Gap]]:
    """Its gaps at the times of faults that hit an instance which had it, then or another time."""
    for event in events:
        gap = stream.longest_gap(event.at, event.at + SLACK_S)
        if gap and not set(replicas).isdisjoint(event.victims):
            yield event.kind, gap
