"""Arrivals have the rate and the burstiness asked for."""

import numpy as np
import pytest

from load_tests.traces.arrivals import arrival_times


def gaps(times):
    return np.diff(times, prepend=0.0)


@pytest.mark.parametrize("rate", [0.42, 38.0])
@pytest.mark.parametrize("cv", [1.0, 2.0, 4.0])
def test_rate_and_cv(rate, cv):
    drawn = gaps(arrival_times(200_000, rate, np.random.default_rng(1), cv))
    assert drawn.mean() == pytest.approx(1 / rate, rel=0.03)
    assert drawn.std() / drawn.mean() == pytest.approx(cv, rel=0.03)


def test_without_a_cv_arrivals_are_poisson():
    times = arrival_times(200_000, 10.0, np.random.default_rng(2))
    counts = np.bincount(times.astype(int))[:-1]  # in each second but the last
    assert counts.mean() == pytest.approx(10, rel=0.02)
    assert counts.var() == pytest.approx(10, rel=0.05)
    assert (gaps(times) > 0.1).mean() == pytest.approx(np.exp(-1), rel=0.02)


def test_the_pattern_is_the_same_at_every_rate():
    slow, fast = (arrival_times(100, rate, np.random.default_rng(3), 4.0) for rate in (1.0, 8.0))
    assert slow == pytest.approx(fast * 8)
