"""A trace: when requests arrive and how long they are, all drawn from one seed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np

from load_tests.traces.arrivals import arrival_times
from load_tests.traces.lengths import Lengths

VOCABULARY = 256
"""Token ids of prompts are below it: those of the tiny model that stand for bytes."""


class TraceError(ValueError):
    """One line that says what is wrong with a trace, and where."""


class Stream(IntEnum):
    """What is drawn at random. Each has numbers of its own: changing one leaves the others."""

    INPUTS = 0
    OUTPUTS = 1
    ARRIVALS = 2
    PRIORITIES = 3
    PICKS = 4
    PROMPTS = 5


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """`at`: seconds from the start. Lengths are in tokens, and at least 1."""

    at: float
    input_tokens: int
    output_tokens: int
    priority: str = "normal"


def synthetic(
    inputs: Lengths,
    outputs: Lengths,
    count: int,
    rate: float,
    *,
    cv: float = 1.0,
    high_priority: float = 0.0,
    seed: int = 0,
) -> list[TraceRequest]:
    """`count` requests at `rate` requests/s; `cv` as in arrival_times.

    `high_priority`: the chance, from 0 to 1, that a request is of that class.
    """
    lengths = zip(
        inputs.sample(count, _rng(seed, Stream.INPUTS)).tolist(),
        outputs.sample(count, _rng(seed, Stream.OUTPUTS)).tolist(),
        strict=True,
    )
    trace = [TraceRequest(0.0, *pair) for pair in lengths]
    return prioritized(arriving(trace, rate, cv, seed), high_priority, seed)


def arriving(
    trace: Sequence[TraceRequest], rate: float, cv: float, seed: int
) -> list[TraceRequest]:
    """The same requests with arrival times drawn anew, at `rate` requests/s."""
    times = arrival_times(len(trace), rate, _rng(seed, Stream.ARRIVALS), cv).tolist()
    return [replace(request, at=at) for request, at in zip(trace, times, strict=True)]


def at_rate(trace: Sequence[TraceRequest], rate: float) -> list[TraceRequest]:
    """The same pattern of arrivals from time 0, stretched to `rate` requests/s on average."""
    first, last = trace[0].at, trace[-1].at
    if last <= first:
        raise TraceError("all requests arrive at once: no rate can be made of that")
    stretch = (len(trace) - 1) / rate / (last - first)
    return [replace(request, at=(request.at - first) * stretch) for request in trace]


def prioritized(trace: Sequence[TraceRequest], share: float, seed: int) -> list[TraceRequest]:
    """The same requests, about `share` of them `high`; those of a smaller share among them."""
    draws = _rng(seed, Stream.PRIORITIES).random(len(trace)).tolist()
    return [
        replace(request, priority="high") if draw < share else request
        for request, draw in zip(trace, draws, strict=True)
    ]


def picked(trace: Sequence[TraceRequest], count: int, seed: int) -> list[TraceRequest]:
    """`count` of the requests, none of them twice, in random order."""
    order = _rng(seed, Stream.PICKS).permutation(len(trace))[:count]
    return [trace[position] for position in order.tolist()]


def prompt_ids(index: int, tokens: int, seed: int = 0) -> list[int]:
    """Random token ids for the prompt of a trace's request number `index`.

    No two prompts have their first four tokens in common, so that a prefix cache finds nothing:
    these spell the index. Prompts shorter than that may be a prefix of another.
    """
    spelled = list(index.to_bytes(4, "little"))
    rest = _rng(seed, Stream.PROMPTS, index).integers(VOCABULARY, size=max(0, tokens - 4))
    return (spelled + rest.tolist())[:tokens]


def _rng(seed: int, *stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, *stream])
