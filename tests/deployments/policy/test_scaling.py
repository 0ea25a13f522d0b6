"""How many instances a fleet gets, by what its requests demand."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.policy.load import InstanceLoad, freeness
from deployments.policy.scaling import Demand, Period, ScalingRule, scale

RULE = ScalingRule(min=1, max=8, freeness_low=10, freeness_high=60, period_s=10)
IDLE = Demand(1000, 0, 0)
BY_HAND = Demand(0, 0, 0)
"""One that somebody drains by hand."""


def told(used: int, **rest) -> Demand:
    """By an instance of 100 blocks, of which so many are used."""
    load = InstanceLoad("a", "running", blocks_total=100, blocks_used=used, **rest)
    usage = used + load.head_of_line_blocks + load.headroom
    steps = freeness(100, usage, load.running, load.waiting)
    return Demand.of(replace(load, freeness=steps))


def test_an_instance_demands_what_its_requests_hold_and_what_its_whole_queue_waits_for():
    assert told(0) == Demand(100, 0, 0)
    assert told(60, running=3) == Demand(100, 60, 3)
    queue = {"waiting": 4, "head_of_line_blocks": 50, "due_blocks": 120}
    assert told(60, running=3, **queue) == Demand(100, 180, 7)


def test_headroom_is_demanded_too():
    assert told(60, running=3, headroom_blocks={"high": 25}) == Demand(100, 85, 3)


def test_a_full_batch_demands_the_memory_that_nobody_can_use():
    full = InstanceLoad(
        "a", "running", 100, 40, running=4, waiting=1, head_of_line_blocks=5, due_blocks=5
    )
    assert Demand.of(replace(full, freeness=(100 - 105) / 5)).blocks == pytest.approx(105)


@pytest.mark.parametrize("state", ["starting", "draining"])
def test_one_that_takes_no_requests_counts_in_nothing(state):
    load = InstanceLoad("a", state, 100, 40, running=4, freeness=-math.inf, due_blocks=9)
    assert Demand.of(load) == Demand(0, 0, 0)


def busy(blocks: float, requests: int = 10) -> Demand:
    """Of 1,000 blocks."""
    return Demand(1000, blocks, requests)


def decided(demands: list[Demand], starting: int = 0, rule: ScalingRule = RULE, **about) -> int:
    """The number of instances after a period in which nothing changed."""
    target, period, now = about.get("target", len(demands) + starting), Period(0.0), 0.0
    while now <= rule.period_s:
        now += 1
        wanted, period = scale(demands, starting, target, period, now, rule)
        if wanted != target:
            return wanted
    return target


def test_one_is_added_where_the_mean_freeness_is_low():
    assert decided([busy(910), busy(900)]) == 3  # 190 blocks for 20 requests
    assert decided([busy(900), busy(900)]) == 2


def test_one_is_stopped_where_it_is_high():
    assert decided([busy(390), busy(400)]) == 1
    assert decided([busy(400), busy(400)]) == 2


def test_none_is_stopped_if_freeness_would_be_low_without_it():
    few_and_long = busy(470, requests=4)  # 132 decode steps
    assert decided([few_and_long] * 2) == 2


def test_an_idle_instance_does_not_lift_the_mean_by_all_of_its_memory():
    """One of five is idle: the mean over instances would be 204, although all others are full."""
    assert decided([busy(950)] * 4 + [IDLE]) == 5


def test_as_many_are_added_at_once_as_the_queues_demand():
    queueing = busy(3000, requests=40)
    assert decided([queueing]) == 4
    assert decided([queueing] * 2) == 7


def test_those_that_start_are_no_reason_to_start_more():
    assert decided([busy(3000, requests=40)], starting=2) == 4
    assert decided([busy(3000, requests=40)], starting=3) == 4
    assert decided([busy(3000, requests=40)], starting=5) == 6


def test_those_that_start_are_not_taken_for_idle():
    assert decided([busy(500)], starting=3) == 4
    assert decided([busy(500)] + [IDLE] * 3) == 3


def test_one_that_cannot_start_does_not_keep_the_others_from_being_stopped():
    assert decided([IDLE] * 4, starting=1) == 4


def test_a_fleet_none_of_which_is_up_yet_is_left_alone():
    assert decided([], starting=2) == 2


def test_an_instance_drained_by_hand_counts_in_nothing():
    assert decided([busy(900), BY_HAND]) == 2
    assert decided([busy(910), BY_HAND]) == 3  # the drained one, and two that serve
    assert decided([busy(400), busy(300), BY_HAND]) == 2


def test_bounds_hold():
    assert decided([busy(9000, requests=100)] * 3) == 8
    assert decided([IDLE]) == 1
    narrower = ScalingRule(min=2, max=3, freeness_low=10, freeness_high=60, period_s=10)
    assert decided([busy(700)], rule=narrower) == 2
    assert decided([busy(700)] * 4, rule=narrower) == 3


def test_what_counts_is_the_mean_over_a_period():
    period = Period(0.0)
    for now in range(1, 10):
        load = busy(980) if now % 2 else busy(700)
        target, period = scale([load], 0, 1, period, float(now), RULE)
        assert target == 1
    assert period.looks == 9
    target, period = scale([busy(980)], 0, 1, period, 10.0, RULE)
    assert (target, period) == (1, Period(10.0))  # 840 on average, which is little enough
    for now in range(11, 21):
        target, period = scale([busy(980)], 0, 1, period, float(now), RULE)
    assert (target, period) == (2, Period(20.0))


thresholds = st.tuples(st.floats(0, 100), st.floats(0.1, 100))


@st.composite
def rules(draw) -> ScalingRule:
    fewest, (low, gap) = draw(st.integers(1, 5)), draw(thresholds)
    return ScalingRule(fewest, fewest + draw(st.integers(0, 15)), low, low + gap, 10)


loads = st.tuples(st.floats(0, 20_000), st.integers(0, 400))


def spread(load: tuple[float, int], instances: int) -> list[Demand]:
    """The same demand, whatever number of instances it is spread over."""
    blocks, requests = load
    ahead = [requests // instances + (n < requests % instances) for n in range(instances)]
    return [Demand(851, blocks / instances, share) for share in ahead]


@given(loads, rules(), st.integers(1, 20))
def test_a_steady_load_comes_to_rest_without_turning_round(load, rule, first):
    numbers = [decided(spread(load, first), rule=rule)]
    for _ in range(25):
        numbers.append(decided(spread(load, numbers[-1]), rule=rule))
    steps = [later - sooner for sooner, later in pairwise(numbers)]
    assert all(step >= 0 for step in steps) or all(step <= 0 for step in steps)
    assert numbers[-1] == numbers[-2]


@given(loads, rules(), st.integers(1, 20))
def test_at_rest_freeness_is_not_low_but_where_no_more_may_be_added(load, rule, first):
    number = first
    for _ in range(25):
        number = decided(spread(load, number), rule=rule)
    blocks, requests = load
    assert number == rule.max or 851 * number - blocks >= rule.freeness_low * requests - 1e-6


@given(
    st.lists(st.builds(Demand, st.sampled_from([0, 851]), st.floats(0, 5000), st.integers(0, 99))),
    st.integers(0, 5),
    rules(),
)
def test_whatever_is_told_bounds_hold_and_one_stops_at_a_time(demands, starting, rule):
    wanted = decided(demands, starting, rule)
    assert rule.min <= wanted <= rule.max
    assert wanted >= min(len(demands) + starting, rule.max) - 1


@given(
    st.lists(st.builds(Demand, st.just(851), st.floats(0, 5000), st.integers(0, 99)), min_size=1),
    st.integers(1, 5),
    rules(),
)
def test_nothing_stops_for_those_that_start(demands, starting, rule):
    """What stops with them would stop without them."""
    present = len(demands) + starting
    if decided(demands, starting, rule) < min(present, rule.max):
        alone = ScalingRule(0, rule.max, rule.freeness_low, rule.freeness_high, rule.period_s)
        assert decided(demands, rule=alone) < len(demands)
