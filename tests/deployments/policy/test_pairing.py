"""Which instances hand requests to which."""

import math
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from deployments.policy.load import InstanceLoad
from deployments.policy.pairing import PairingRule, Target, pair

RULE = PairingRule(out_threshold=3, in_threshold=10, min_gain=5)


def load(name: str, freeness: float, **rest) -> InstanceLoad:
    sizes = {"blocks_total": 1000, "running": 1}
    return InstanceLoad(name, **{"state": "running", "freeness": freeness} | sizes | rest)


def blocked(name: str, used: int, head: int, running: int = 1, **rest) -> InstanceLoad:
    """Of 1,000 blocks; its head of line wants more than are free."""
    return load(
        name,
        1000 - used - head,
        blocks_used=used,
        running=running,
        waiting=1,
        head_of_line_blocks=head,
        **rest,
    )


def paired(loads: list[InstanceLoad], rule: PairingRule = RULE) -> dict[str, str]:
    """Each source's first target; only draining ones have more."""
    return {source: to[0].replica_id for source, to in pair(loads, rule).items()}


def each(loads: list[InstanceLoad], rule: PairingRule) -> list[tuple[str, str]]:
    """Each source with each of its targets."""
    return [(source, t.replica_id) for source, to in pair(loads, rule).items() for t in to]


def test_the_least_free_is_paired_with_the_freest_and_the_next_with_the_next():
    loads = [load("a", 2), load("b", 50), load("c", -4), load("d", 90)]
    assert paired(loads) == {"c": "d", "a": "b"}


def test_an_instance_at_the_out_threshold_keeps_its_requests():
    assert paired([load("a", 3), load("b", 50)]) == {}


def test_an_instance_at_the_in_threshold_takes_none():
    assert paired([load("a", -50), load("b", 10)]) == {}


def test_a_pair_must_gain_more_than_the_minimum():
    rule = PairingRule(out_threshold=10, in_threshold=10, min_gain=5)
    assert paired([load("a", 9), load("b", 14)], rule) == {}
    assert paired([load("a", 9), load("b", 14.5)], rule) == {"a": "b"}


def test_between_crossed_thresholds_the_less_free_hands_over_to_the_freer():
    rule = PairingRule(out_threshold=20, in_threshold=5, min_gain=0)
    assert paired([load("a", 6), load("b", 12), load("c", 19)], rule) == {"a": "c"}


def test_an_instance_whose_head_of_line_does_not_fit_takes_nothing():
    waits = load("b", 90, waiting=1, blocks_used=800, head_of_line_blocks=201)
    assert paired([load("a", 0), waits]) == {}


def test_one_whose_head_of_line_only_waits_for_the_end_of_a_step_takes_some():
    waits = load("b", 90, waiting=1, blocks_used=800, head_of_line_blocks=100)
    assert pair([load("a", 0), waits], RULE)["a"][0].room == 100 - 2 * RULE.in_threshold


def test_a_starting_or_draining_instance_takes_nothing():
    gone = load("c", -math.inf, state="draining", running=0)
    assert paired([load("a", 0), load("b", 90, state="starting"), gone]) == {}


def test_an_idle_instance_has_nothing_to_give():
    assert paired([load("a", 0, running=0), load("b", 90)]) == {}


def test_requests_that_wait_are_something_to_give():
    assert paired([load("a", 0, running=0, waiting=2), load("b", 90)]) == {"a": "b"}


def test_a_draining_instance_comes_before_a_crowded_one():
    crowded = load("a", -50, blocks_used=950)
    assert paired([crowded, load("b", -math.inf, state="draining"), load("c", 90)]) == {"b": "c"}


def test_a_draining_instance_empties_itself_into_a_crowded_one_as_long_as_nobody_is_preempted():
    leaves = load("a", -math.inf, state="draining", blocks_used=100)
    crowded = load("b", 4, blocks_used=980, running=5)
    assert pair([leaves, crowded], RULE) == {"a": (Target("b", 20 - 7),)}
    assert pair([leaves, replace(crowded, blocks_used=994)], RULE) == {}


def test_each_draining_instance_has_a_destination_of_its_own_while_there_are_enough():
    leaving = [load(name, -math.inf, state="draining") for name in "ab"]
    takers = [load("c", 7, blocks_used=500), load("d", 5, blocks_used=400)]
    assert paired([*leaving, *takers]) == {"a": "d", "b": "c"}
    assert paired([*leaving, takers[0]]) == {"a": "c", "b": "c"}


def test_a_draining_instance_has_the_roomiest_destinations_as_many_as_it_may_have_moves_at_once():
    rule = replace(RULE, at_once=2)
    takers = [load(f"t{n}", 9 - n, blocks_used=900 - 100 * n) for n in range(4)]
    fleet = [load("a", -math.inf, state="draining"), *takers]
    assert [target.replica_id for target in pair(fleet, rule)["a"]] == ["t3", "t2"]


def test_before_those_whose_head_of_line_waits_for_blocks():
    leaves = load("a", -math.inf, state="draining")
    loads = [leaves, blocked("b", 100, 950), load("c", 9, blocks_used=900)]
    assert paired(loads) == {"a": "c"}


def test_what_the_head_of_line_of_a_destination_is_about_to_take_is_left_to_it():
    leaves = load("a", -math.inf, state="draining")
    assert pair([leaves, load("b", 5, blocks_used=900, head_of_line_blocks=60)], RULE) == {
        "a": (Target("b", 100 - 60 - 3),)
    }


def test_requests_stay_among_instances_of_the_same_model():
    old, new = load("a", 0, fingerprint="7b"), load("b", 90, fingerprint="13b")
    assert paired([old, new]) == {}
    assert paired([replace(old, state="draining", freeness=-math.inf), new]) == {}
    assert paired([old, new, load("c", 50, fingerprint="7b")]) == {"a": "c"}


def test_sources_without_a_destination_left_are_not_paired():
    assert paired([load("a", 0), load("b", 1), load("c", 90)]) == {"a": "c"}


def test_a_destination_must_stay_freer_than_its_source_was():
    rule = PairingRule(out_threshold=50, in_threshold=1, min_gain=2)
    source = load("a", 40, blocks_used=920, running=2)
    taker = load("b", 75, blocks_used=700, running=4)
    assert pair([source, taker], rule)["a"][0].room == 300 - 42 * 5


def test_what_is_kept_free_at_a_destination_is_no_room():
    source = load("a", 0)
    taker = load("b", 50, blocks_used=300, headroom_blocks={"high": 400, "batch": 50})
    assert pair([source, taker], RULE)["a"][0].room == 700 - 450 - 2 * RULE.in_threshold


def test_where_no_other_instance_takes_any_headroom_is_lent_to_what_would_wait():
    waits = blocked("a", 900, 120)
    keeps = load("b", -100, blocks_used=200, headroom_blocks={"high": 900})
    assert pair([waits, keeps], RULE) == {"a": (Target("b", 800 - 2 * RULE.in_threshold),)}
    assert paired([waits, keeps, load("c", 90)]) == {"a": "c"}
    assert paired([waits, keeps, load("c", 90), load("d", 80)]) == {"a": "c", "b": "d"}, "back"


def test_the_most_is_lent_to_one_that_is_about_to_preempt_then_to_heads_of_line_in_their_turn():
    high = {"high": 900}
    loads = [
        blocked("a", 900, 120, head_of_line_since=20.0),
        blocked("b", 900, 120, head_of_line_since=10.0),
        blocked("c", 900, 120, head_of_line_since=30.0, head_of_line_priority=-10),
        load("d", 1, blocks_used=999, running=2),
        *(load(f"e{n}", -100, blocks_used=500 - n, headroom_blocks=high) for n in range(3)),
    ]
    assert paired(loads) == {"d": "e2", "c": "e1", "b": "e0"}


def test_what_the_head_of_line_of_a_lender_is_about_to_take_is_not_lent():
    waits = blocked("a", 900, 120)
    high = {"high": 900}
    lender = load("b", -100, blocks_used=200, head_of_line_blocks=300, headroom_blocks=high)
    assert pair([waits, lender], RULE)["a"][0].room == 800 - 300 - 2 * RULE.in_threshold
    assert paired([waits, replace(lender, head_of_line_blocks=780)]) == {}


def test_headroom_is_not_lent_where_one_of_its_class_waits_for_it():
    waits = blocked("a", 900, 120, head_of_line_since=10.0)
    urgent = {"head_of_line_priority": -10, "headroom_blocks": {"high": 900}}
    assert paired([waits, blocked("b", 700, 500, head_of_line_since=20.0, **urgent)]) == {"b": "a"}


def test_a_squeeze_takes_what_is_kept_free_too():
    old = blocked("a", 900, 120, head_of_line_since=10.0)
    young = blocked("b", 700, 500, head_of_line_since=20.0, headroom_blocks={"high": 250})
    assert pair([old, young], RULE)["a"][0].room == 300 - 2 * RULE.in_threshold


def test_an_instance_with_nothing_but_requests_that_stay_leaves_the_destination_to_others():
    urgent = load("a", -50, running=2, waiting=1, staying=3, blocks_used=300)
    assert paired([urgent, load("b", 2), load("c", 90)]) == {"b": "c"}
    assert paired([replace(urgent, staying=2), load("b", 2), load("c", 90)]) == {"a": "c"}


def test_where_blocks_are_lacking_even_those_that_stay_may_go():
    starving = load("a", -50, running=2, staying=2, blocks_used=999)
    waits = load(
        "b", -50, running=1, waiting=1, staying=2, blocks_used=600, head_of_line_blocks=401
    )
    for urgent in (starving, waits):
        assert paired([urgent, load("c", 90)]) == {urgent.replica_id: "c"}


def test_where_nobody_is_free_the_last_to_wait_takes_from_the_one_that_waits_longest():
    loads = [
        blocked("a", 900, 120, head_of_line_since=20.0),
        blocked("b", 700, 500, head_of_line_since=30.0),
        blocked("c", 800, 230, head_of_line_since=10.0),
    ]
    assert paired(loads) == {"c": "b"}
    assert pair(loads, RULE)["c"] == (Target("b", 300 - 2 * RULE.in_threshold, before=(0, 30.0)),)


def test_one_with_headroom_that_lacks_no_blocks_at_once_comes_after_the_others():
    keeps = load("a", -300, blocks_used=300, headroom_blocks={"high": 900})
    assert paired([keeps, load("b", 1), load("c", 90)]) == {"b": "c"}
    assert paired([keeps, load("b", 3), load("c", 90)]) == {"a": "c"}
    starving = replace(keeps, blocks_used=1000)
    assert paired([starving, load("b", 1), load("c", 90)]) == {"a": "c"}


def test_and_has_the_destination_that_does_not_gain_them_enough():
    rule = replace(RULE, in_threshold=2)
    keeps = load("a", -20, blocks_used=300, headroom_blocks={"high": 900})
    assert paired([keeps, load("b", 2.9), load("c", 3.5)], rule) == {"a": "c"}


def test_a_destination_waits_for_the_one_that_needs_it_most_although_nothing_fits_there_yet():
    taker = load("c", 11, blocks_used=790, running=18)
    pairs = pair([load("a", -50), load("b", 2), taker], RULE)
    assert {source: target.room for source, (target,) in pairs.items()} == {"a": 20}
    assert pair([load("a", -50), replace(taker, blocks_used=820)], RULE)["a"][0].room == -10


def test_what_waits_may_go_wherever_nobody_waits_for_blocks():
    (target,) = pair([load("a", 1, waiting=5), load("b", 90)], RULE)["a"]
    assert target.before == (math.inf, math.inf)


def test_before_that_comes_one_that_is_about_to_preempt():
    loads = [
        load("a", 1, blocks_used=999, running=2),
        blocked("b", 700, 500, head_of_line_since=30.0),
        blocked("c", 800, 230, head_of_line_since=10.0),
    ]
    assert paired(loads) == {"a": "b"}


def test_one_that_has_nothing_to_spare_takes_nothing():
    old, young = (
        blocked(name, used, 500, head_of_line_since=at)
        for name, used, at in (("a", 900, 10.0), ("b", 985, 20.0))
    )
    assert paired([old, young]) == {}


def test_a_single_instance_whose_head_of_line_does_not_fit_finds_nobody():
    assert paired([blocked("a", 900, 120), load("b", 5)]) == {}


numbers = st.floats(-1e4, 1e4)
rules = st.builds(PairingRule, numbers, numbers, st.floats(0, 1e4))
states = st.sampled_from(["starting", "running", "draining"])


@st.composite
def fleets(draw) -> list[InstanceLoad]:
    fleet = []
    for number in range(draw(st.integers(0, 12))):
        state = draw(states)
        freeness = -math.inf if state == "draining" else draw(numbers)
        counts: dict[str, Any] = {
            "running": draw(st.integers(0, 6)),
            "waiting": draw(st.integers(0, 2)),
        }
        counts["headroom_blocks"] = draw(st.sampled_from([{}, {"high": 200}]))
        counts["blocks_used"] = draw(st.integers(0, 1000))
        counts["head_of_line_blocks"] = draw(st.integers(0, 1000)) if counts["waiting"] else 0
        counts["head_of_line_since"] = draw(st.floats(0, 100))
        counts["head_of_line_priority"] = draw(st.sampled_from([0, 0, -10]))
        fleet.append(load(f"r{number}", freeness, state=state, **counts))
    return fleet


@given(fleets(), rules)
def test_no_instance_is_in_two_pairs_but_with_draining_ones(fleet, rule):
    leaving = {x.replica_id for x in fleet if x.state == "draining"}
    pairs = each(fleet, rule)
    evacuated = {taker for source, taker in pairs if source in leaving}
    others = [taker for source, taker in pairs if source not in leaving]
    named = [*{source for source, _ in pairs}, *evacuated, *others]
    assert len(named) == len(set(named))


def is_blocked(load: InstanceLoad) -> bool:
    return load.head_of_line_blocks > load.blocks_total - load.blocks_used


def is_starving(load: InstanceLoad) -> bool:
    return load.blocks_total - load.blocks_used < load.running


@given(fleets(), rules)
def test_every_pair_gains_freeness_or_uses_blocks_that_lie_idle(fleet, rule):
    known = {x.replica_id: x for x in fleet}
    for source, taker in each(fleet, rule):
        here, there = known[source], known[taker]
        gains = there.freeness > here.freeness
        lends = there.headroom and (is_blocked(here) or is_starving(here))
        assert gains or lends or is_blocked(there) or here.state == "draining"


@given(fleets(), rules)
def test_of_two_whose_heads_of_line_wait_the_first_in_turn_gives_unless_it_gains(fleet, rule):
    known = {x.replica_id: x for x in fleet}
    for source, taker in each(fleet, rule):
        here, there = known[source], known[taker]
        if is_blocked(there) and not is_starving(here) and here.state != "draining":
            turns = [(x.head_of_line_priority, x.head_of_line_since) for x in (here, there)]
            assert turns == sorted(turns)


@given(fleets(), rules)
def test_only_running_instances_take_requests(fleet, rule):
    takers = {x.replica_id for x in fleet if x.state == "running"}
    assert {taker for _, taker in each(fleet, rule)} <= takers


@given(st.lists(st.floats(0, 5), min_size=1, max_size=12), numbers)
def test_a_balanced_fleet_is_left_alone(gaps, level):
    fleet = [load(f"r{number}", level + gap) for number, gap in enumerate(gaps)]
    assert pair(fleet, PairingRule(level + 2, level + 2, min_gain=5.001)) == {}


@given(fleets(), rules, st.randoms())
def test_the_order_of_the_reports_does_not_matter(fleet, rule, rng):
    shuffled = rng.sample(fleet, len(fleet))
    assert pair(shuffled, rule) == pair(fleet, rule)
