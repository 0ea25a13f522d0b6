"""From records to the numbers that `vllm bench serve` reports, under the same JSON keys."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from load_tests.client import Record

PERCENTILES = (50, 95, 99)

Numbers = dict[str, float]


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile, interpolated linearly as numpy does; 0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(name: str, seconds: Iterable[float]) -> Numbers:
    """Mean, median, standard deviation and PERCENTILES in milliseconds; 0 of nothing."""
    ordered = sorted(seconds)  # which makes it cheap for `percentile` to sort it again
    numbers = {
        f"mean_{name}_ms": statistics.fmean(ordered) if ordered else 0.0,
        f"median_{name}_ms": percentile(ordered, 50),
        f"std_{name}_ms": statistics.pstdev(ordered) if ordered else 0.0,
    }
    numbers |= {f"p{q}_{name}_ms": percentile(ordered, q) for q in PERCENTILES}
    return {key: 1000 * value for key, value in numbers.items()}


def summarize(records: Sequence[Record], duration: float) -> Numbers:
    """Throughput, and TTFT, TPOT, ITL and whole latency in milliseconds."""
    good = [record for record in records if not record.error]
    input_tokens = sum(record.prompt_tokens for record in good)
    output_tokens = sum(record.output_tokens for record in good)
    numbers: Numbers = {
        "duration": duration,
        "completed": len(good),
        "failed": len(records) - len(good),
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(good) / duration,
        "output_throughput": output_tokens / duration,
        "total_token_throughput": (input_tokens + output_tokens) / duration,
    }
    numbers |= spread("ttft", [record.ttft for record in good])
    numbers |= spread("tpot", [record.tpot for record in good])
    numbers |= spread("itl", [gap for record in good for gap in record.itl])
    numbers |= spread("e2el", [record.latency for record in good])
    return numbers


def median_of(rounds: Sequence[Mapping[str, float]]) -> Numbers:
    """Each number's median over the rounds."""
    return {key: _over(rounds, key, statistics.median) for key in rounds[0]}


def ratio(ours: Mapping[str, float], theirs: Mapping[str, float], key: str) -> float:
    """Ours over theirs; 0 where theirs is 0."""
    return ours[key] / theirs[key] if theirs[key] else 0.0


def _over(
    rounds: Sequence[Mapping[str, float]], key: str, how: Callable[[list[float]], float]
) -> float:
    return how([numbers[key] for numbers in rounds])
