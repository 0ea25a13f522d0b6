"""Percentiles, and the JSON keys of `vllm bench serve`."""

import pytest

from load_tests.client import Record
from load_tests.metrics import median_of, percentile, summarize


def record(*arrivals, started=0.0, output_tokens=None, error=""):
    return Record(
        started=started,
        arrivals=list(arrivals),
        prompt_tokens=10,
        output_tokens=len(arrivals) if output_tokens is None else output_tokens,
        error=error,
    )


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [
        ([], 50, 0.0),
        ([7.0], 99, 7.0),
        ([4.0, 1.0, 3.0, 2.0], 50, 2.5),
        ([4.0, 1.0, 3.0, 2.0], 0, 1.0),
        ([4.0, 1.0, 3.0, 2.0], 100, 4.0),
        (list(range(101)), 95, 95),
    ],
)
def test_percentile_is_numpys(values, q, expected):
    assert percentile(values, q) == pytest.approx(expected)


def test_summary():
    records = [record(0.1, 0.2, 0.4), record(1.3, 1.4, started=1.0)]
    numbers = summarize(records, duration=2.0)
    assert numbers["completed"] == 2
    assert numbers["failed"] == 0
    assert numbers["total_input_tokens"] == 20
    assert numbers["total_output_tokens"] == 5
    assert numbers["output_throughput"] == pytest.approx(2.5)
    assert numbers["total_token_throughput"] == pytest.approx(12.5)
    assert numbers["mean_ttft_ms"] == pytest.approx(200)
    assert numbers["median_tpot_ms"] == pytest.approx(125)
    assert numbers["median_itl_ms"] == pytest.approx(100)
    assert numbers["p99_e2el_ms"] == pytest.approx(400)


def test_tokens_that_came_in_one_event_count_in_tpot():
    assert record(0.0, 0.8, output_tokens=5).tpot == pytest.approx(0.2)


def test_failed_requests_are_counted_and_left_out():
    numbers = summarize([record(0.1, 0.2), record(error="HTTP 500")], duration=1.0)
    assert (numbers["completed"], numbers["failed"]) == (1, 1)
    assert numbers["total_output_tokens"] == 2


def test_nothing_at_all():
    assert summarize([], duration=1.0)["output_throughput"] == 0


def test_median_of_rounds():
    rounds = [{"a": 1.0, "b": 5.0}, {"a": 9.0, "b": 5.0}, {"a": 2.0, "b": 6.0}]
    assert median_of(rounds) == {"a": 2.0, "b": 5.0}
