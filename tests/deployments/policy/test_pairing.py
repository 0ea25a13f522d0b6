"""Which instances hand requests to which."""

import math

from hypothesis import given
from hypothesis import strategies as st

from deployments.policy.load import InstanceLoad
from deployments.policy.pairing import PairingRule, pair

RULE = PairingRule(out_threshold=3, in_threshold=10, min_gain=5)


def load(name: str, freeness: float, **rest) -> InstanceLoad:
    return InstanceLoad(name, **{"state": "running", "freeness": freeness, "running": 1} | rest)


def test_the_least_free_is_paired_with_the_freest_and_the_next_with_the_next():
    loads = [load("a", 2), load("b", 50), load("c", -4), load("d", 90)]
    assert pair(loads, RULE) == {"c": "d", "a": "b"}


def test_an_instance_at_the_out_threshold_keeps_its_requests():
    assert pair([load("a", 3), load("b", 50)], RULE) == {}


def test_an_instance_at_the_in_threshold_takes_none():
    assert pair([load("a", -50), load("b", 10)], RULE) == {}


def test_a_pair_must_gain_more_than_the_minimum():
    rule = PairingRule(out_threshold=10, in_threshold=10, min_gain=5)
    assert pair([load("a", 9), load("b", 14)], rule) == {}
    assert pair([load("a", 9), load("b", 14.5)], rule) == {"a": "b"}


def test_crossed_thresholds_do_not_make_an_instance_source_and_destination_at_once():
    rule = PairingRule(out_threshold=20, in_threshold=5, min_gain=0)
    assert pair([load("a", 6), load("b", 19)], rule) == {}


def test_an_instance_with_a_queue_takes_nothing():
    assert pair([load("a", 0), load("b", 90, waiting=1)], RULE) == {}


def test_a_starting_or_draining_instance_takes_nothing():
    loads = [load("a", 0), load("b", 90, state="starting"), load("c", 90, state="draining")]
    assert pair(loads, RULE) == {}


def test_an_idle_instance_has_nothing_to_give():
    assert pair([load("a", 0, running=0), load("b", 90)], RULE) == {}


def test_requests_that_wait_are_something_to_give():
    assert pair([load("a", 0, running=0, waiting=2), load("b", 90)], RULE) == {"a": "b"}


def test_a_draining_instance_comes_before_a_crowded_one():
    loads = [load("a", -50), load("b", -math.inf, state="draining"), load("c", 90)]
    assert pair(loads, RULE) == {"b": "c"}


def test_sources_without_a_destination_left_are_not_paired():
    assert pair([load("a", 0), load("b", 1), load("c", 90)], RULE) == {"a": "c"}


numbers = st.floats(-1e4, 1e4)
rules = st.builds(PairingRule, numbers, numbers, st.floats(0, 1e4))
states = st.sampled_from(["starting", "running", "draining"])


@st.composite
def fleets(draw) -> list[InstanceLoad]:
    fleet = []
    for number in range(draw(st.integers(0, 12))):
        state = draw(states)
        freeness = -math.inf if state == "draining" else draw(numbers)
        counts = {name: draw(st.integers(0, 2)) for name in ("running", "waiting")}
        fleet.append(load(f"r{number}", freeness, state=state, **counts))
    return fleet


@given(fleets(), rules)
def test_no_instance_is_in_two_pairs(fleet, rule):
    pairs = pair(fleet, rule)
    named = [*pairs.keys(), *pairs.values()]
    assert len(named) == len(set(named))


@given(fleets(), rules)
def test_every_pair_gains(fleet, rule):
    known = {x.replica_id: x for x in fleet}
    for source, destination in pair(fleet, rule).items():
        assert known[destination].freeness > known[source].freeness


@given(fleets(), rules)
def test_only_running_instances_without_a_queue_take_requests(fleet, rule):
    takers = {x.replica_id for x in fleet if x.state == "running" and x.waiting == 0}
    assert set(pair(fleet, rule).values()) <= takers


@given(st.lists(st.floats(0, 5), min_size=1, max_size=12), numbers)
def test_a_balanced_fleet_is_left_alone(gaps, level):
    fleet = [load(f"r{number}", level + gap) for number, gap in enumerate(gaps)]
    assert pair(fleet, PairingRule(level + 2, level + 2, min_gain=5.001)) == {}


@given(fleets(), rules, st.randoms())
def test_the_order_of_the_reports_does_not_matter(fleet, rule, rng):
    shuffled = rng.sample(fleet, len(fleet))
    assert pair(shuffled, rule) == pair(fleet, rule)
