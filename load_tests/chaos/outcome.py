"""What came of a scenario, and which of its promises it broke."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from load_tests.chaos.faults import TAKES, Event
from load_tests.chaos.growth import Growth, Sample, growth
from load_tests.chaos.pauses import Pause, Prefills, of_stream
from load_tests.chaos.scenarios import Scenario
from load_tests.chaos.streams import Stream, Verdict
from load_tests.chaos.watch import Look, longest_excess_s

TWO_OWNERS_S = 5.0
"""Instances may hold more requests than there are streams for so long: loads are reported late, and
one that comes back from a hang must first be told that its requests are elsewhere.
"""

BREAKS_S = 3.0
"""Streams of a killed ingress break within this time."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one run. `expected`: each request of the pool undisturbed; `calm`: streams before faults.

    `told`: what the admin API said of each request; `began`: seconds of time.perf_counter.
    """

    scenario: Scenario
    seed: int
    began: float
    seconds: float
    expected: Sequence[Stream]
    calm: Sequence[Stream]
    streams: Sequence[Stream]
    events: Sequence[Event]
    looks: Sequence[Look]
    usage: Sequence[Sample]
    told: Mapping[str, Mapping[str, Any]]
    prefills: Prefills
    leaks: Sequence[str]

    def of(self, verdict: Verdict) -> list[Stream]:
        """The streams with this verdict."""
        return [one for one in self.streams if one.verdict(self.expected[one.number]) == verdict]

    @property
    def kills(self) -> int:
        """Processes killed."""
        return sum(len(event.killed) for event in self.events)

    @property
    def instances_killed(self) -> int:
        """Those of them that were instances."""
        return sum(len(event.killed) for event in self.events if event.kind in TAKES)

    @property
    def recoveries(self) -> int:
        """How often a request went on after a loss."""
        return sum(request["recoveries"] for request in self.told.values())

    @property
    def excess_s(self) -> float:
        """The longest time for which some stream can have had two owners, in seconds."""
        return longest_excess_s(self.looks)

    def pauses(self) -> list[Pause]:
        """Of all streams that were recovered."""
        found = (
            of_stream(stream, self.told.get(stream.name, {}), self.events, self.prefills)
            for stream in self.streams
        )
        return [pause for pause in found if pause]

    def moves(self) -> Counter[str]:
        """Attempts to move a request, by what came of them."""
        return Counter(
            move["outcome"] for request in self.told.values() for move in request["migrations"]
        )

    def growth(self) -> list[Growth]:
        """What its processes take, soon after the start and at the end."""
        return growth(self.usage)

    def broken(self) -> list[str]:
        """The promises that it broke, a line for each."""
        return list(_broken(self))


@dataclass(frozen=True, slots=True)
class Break:
    """The kill of an ingress: how many streams ran, how many broke with it, how many that began
    just after it failed, and how many seconds later one of those that did not had its first token.
    """

    open: int
    broken: int
    refused: int
    again_s: float


def breaks(outcome: Outcome) -> list[Break]:
    """One for each kill of an ingress."""
    return [
        _break(event.at, outcome.streams) for event in outcome.events if event.kind == "ingress"
    ]


def _break(at: float, streams: Sequence[Stream]) -> Break:
    there = [stream for stream in streams if stream.started < at < stream.ended]
    later = [stream for stream in streams if stream.started >= at]
    broken, refused = (
        sum(bool(stream.error) and stream.ended < at + BREAKS_S for stream in some)
        for some in (there, later)
    )
    firsts = [stream.arrivals[0] for stream in later if stream.arrivals]
    return Break(len(there), broken, refused, min(firsts, default=float("inf")) - at)


def _broken(outcome: Outcome) -> Iterator[str]:
    scenario, failed, wrong = outcome.scenario, outcome.of("failed"), outcome.of("wrong")
    if wrong:
        yield f"{len(wrong)} streams with wrong tokens"
    match scenario.loses:
        case "none" if failed:
            yield f"{len(failed)} streams failed"
        case "some" if not failed:
            yield "no stream was lost, so this is no control"
        case "of the ingress":
            yield from _wrongly_broken(outcome, failed)
    if outcome.kills < scenario.kills:
        yield f"only {outcome.kills} of {scenario.kills} kills"
    if outcome.excess_s > TWO_OWNERS_S:
        yield f"instances held more requests than there were for {outcome.excess_s:.1f} s"
    yield from outcome.leaks
    if scenario.flat:
        for one in outcome.growth():
            if not one.flat:
                yield f"{one.role}: {one.what} grew from {one.before:.0f} to {one.after:.0f}"


def _wrongly_broken(outcome: Outcome, failed: Sequence[Stream]) -> Iterator[str]:
    kills = [event.at for event in outcome.events if event.kind == "ingress"]
    others = [
        stream for stream in failed if not any(0 <= stream.ended - at < BREAKS_S for at in kills)
    ]
    if others:
        yield f"{len(others)} streams failed while no ingress was killed"
    if any(0 < one.open == one.broken for one in breaks(outcome)):
        yield "all streams broke with one of two ingresses"
