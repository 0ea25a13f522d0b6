"""A trace's parts are drawn apart from each other, and its prompts have nothing in common."""

import pytest

from load_tests.traces.lengths import INPUTS
from load_tests.traces.trace import (
    TraceError,
    TraceRequest,
    at_rate,
    picked,
    prompt_ids,
    synthetic,
)

S, L = INPUTS["S"], INPUTS["L"]


def draw(rate=2.0, count=1000, **changes):
    return synthetic(S, L, count, rate, **{"seed": 7, **changes})


def lengths(trace):
    return [(request.input_tokens, request.output_tokens) for request in trace]


def high(trace):
    return {at for at, request in enumerate(trace) if request.priority == "high"}


def test_the_seed_decides_all():
    assert draw(high_priority=0.1) == draw(high_priority=0.1)
    assert lengths(draw()) != lengths(draw(seed=8))


def test_the_rate_leaves_lengths_and_priorities():
    slow, fast = draw(rate=1.0, high_priority=0.1), draw(rate=4.0, high_priority=0.1)
    assert lengths(slow) == lengths(fast)
    assert high(slow) == high(fast)
    assert [r.at for r in slow] == pytest.approx([4 * r.at for r in fast])


def test_burstiness_leaves_lengths():
    assert lengths(draw(cv=4.0)) == lengths(draw())
    assert [r.at for r in draw(cv=4.0)] != [r.at for r in draw()]


def test_the_share_of_high_priority_leaves_the_rest():
    none, few, more = (draw(high_priority=share) for share in (0.0, 0.1, 0.3))
    assert lengths(none) == lengths(few) == lengths(more)
    assert [r.at for r in none] == [r.at for r in few]
    assert not high(none)
    assert 70 < len(high(few)) < 130
    assert high(few) < high(more)


def test_inputs_and_outputs_are_independent():
    trace = synthetic(S, S, 1000, 1.0)
    assert sum(request.input_tokens == request.output_tokens for request in trace) < 100


def test_at_rate_keeps_the_pattern():
    trace = [TraceRequest(at, 1, 1) for at in (5.0, 6.0, 9.0)]
    assert [request.at for request in at_rate(trace, 4.0)] == [0.0, 0.125, 0.5]


def test_no_rate_without_time():
    with pytest.raises(TraceError, match="at once"):
        at_rate([TraceRequest(3.0, 1, 1)] * 2, 1.0)


def test_picked_takes_each_request_once():
    trace = [TraceRequest(0.0, tokens, 1) for tokens in range(1, 101)]
    chosen = picked(trace, 60, seed=1)
    assert len(set(lengths(chosen))) == 60
    assert lengths(chosen) != lengths(trace)[:60]
    assert picked(trace, 60, seed=1) == chosen


def test_prompts_share_no_prefix():
    prompts = [prompt_ids(index, 20) for index in range(2000)]
    assert len({tuple(prompt[:4]) for prompt in prompts}) == len(prompts)
    assert {len(prompt) for prompt in prompts} == {20}
    drawn = {token for prompt in prompts for token in prompt}
    assert drawn == set(range(256))


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 6000])
def test_prompts_are_as_long_as_asked(tokens):
    assert len(prompt_ids(300, tokens)) == tokens


def test_prompts_depend_on_the_seed():
    assert prompt_ids(1, 20, seed=1) == prompt_ids(1, 20, seed=1) != prompt_ids(1, 20, seed=2)
