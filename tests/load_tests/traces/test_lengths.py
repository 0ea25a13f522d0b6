"""Drawn lengths have the mean and the percentiles of the paper's table."""

import numpy as np
import pytest

from load_tests.traces.lengths import CAP, INPUTS, OUTPUTS

TABLES = [(side, name) for side in ("input", "output") for name in INPUTS]


def table(side, name):
    return (INPUTS if side == "input" else OUTPUTS)[name]


@pytest.mark.parametrize(("side", "name"), TABLES)
def test_percentiles_and_mean(side, name):
    lengths = table(side, name)
    drawn = lengths.sample(100_000, np.random.default_rng(1))
    for q, tokens in ((50, lengths.p50), (80, lengths.p80), (95, lengths.p95), (99, lengths.p99)):
        assert np.percentile(drawn, q) == pytest.approx(tokens, rel=0.05, abs=2), f"P{q}"
    assert drawn.mean() == pytest.approx(lengths.mean, rel=0.03)


@pytest.mark.parametrize(("side", "name"), TABLES)
def test_the_mean_is_exact_but_for_the_luck_of_the_draw(side, name):
    lengths = table(side, name)
    assert lengths.sample(2_000_000, np.random.default_rng(2)).mean() == pytest.approx(
        lengths.mean, rel=0.006
    )


@pytest.mark.parametrize("name", ["S", "sharegpt", "burstgpt"])
def test_the_power_law_goes_on_beyond_p99(name):
    lengths = OUTPUTS[name]  # P99.8 is five times as rare as P99, as that is to P95
    drawn = lengths.sample(1_000_000, np.random.default_rng(5))
    assert np.percentile(drawn, 99.8) == pytest.approx(lengths.p99**2 / lengths.p95, rel=0.05)


def test_whole_tokens_within_bounds():
    drawn = INPUTS["M"].sample(100_000, np.random.default_rng(3))
    assert drawn.dtype == np.int64
    assert (drawn.min(), drawn.max()) == (1, CAP)


def test_inputs_and_outputs_differ_where_the_paper_has_two_tables():
    assert INPUTS["M"] == OUTPUTS["M"]
    assert INPUTS["sharegpt"] != OUTPUTS["sharegpt"]
    assert INPUTS["burstgpt"] != OUTPUTS["burstgpt"]


def test_a_longer_trace_begins_with_the_shorter_one():
    short, long = (INPUTS["S"].sample(n, np.random.default_rng(4)).tolist() for n in (50, 100))
    assert long[:50] == short
