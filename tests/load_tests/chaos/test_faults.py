"""Which faults come, and whom they hit."""

from collections import Counter
from itertools import islice

import pytest

from load_tests.chaos.faults import HANGS, JITTER, TAKES, Event, picked, plan
from load_tests.chaos.scenarios import HANG_S, SCENARIOS

DECK = ("kill", "kill", "short hang", "long hang", "burst")


def first(count, deck=DECK, seed=0):
    return list(islice(plan(deck, 10.0, seed), count))


def test_a_seed_has_the_same_faults_every_time_and_another_one_others():
    assert first(30) == first(30)
    assert first(30) != first(30, seed=1)


def test_every_round_has_all_of_the_deck():
    faults = first(3 * len(DECK))
    for begin in range(0, len(faults), len(DECK)):
        kinds = Counter(fault.kind for fault in faults[begin : begin + len(DECK)])
        assert kinds == Counter(DECK)


def test_faults_come_about_as_often_as_asked_for():
    waits = [fault.after_s for fault in first(200)]
    assert all(10 * (1 - JITTER) <= wait <= 10 * (1 + JITTER) for wait in waits)
    assert sum(waits) / len(waits) == pytest.approx(10, rel=0.1)


def test_short_hangs_are_over_before_an_instance_is_given_up_and_long_ones_are_not():
    hangs = {kind: [f.hang_s for f in first(200) if f.kind == kind] for kind in DECK}
    assert max(hangs["short hang"]) < HANG_S < min(hangs["long hang"])
    assert set(hangs["kill"]) == {0.0}


def test_the_victims_are_among_the_candidates_and_never_the_same_twice():
    for pick in (0.0, 0.4, 0.999):
        (one,) = picked("cab", pick)
        two = picked("cab", pick, 2)
        assert one == two[0]
        assert set(two) < set("abc")
        assert len(set(two)) == 2


def test_one_that_was_stopped_was_not_killed():
    assert Event(1.0, "both ends", ("a", "b")).killed == ("a", "b")
    assert Event(1.0, "long hang", ("a",), hang_s=9.0).killed == ()


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=lambda scenario: scenario.name)
def test_every_fault_of_a_scenario_can_happen_to_its_fleet(scenario):
    most = max(TAKES.get(kind, 0) for kind in scenario.deck)
    assert scenario.survivors + most <= scenario.instances
    assert HANGS.keys() < TAKES.keys()
