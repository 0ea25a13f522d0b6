"""Whether a request can have had two owners."""

import pytest

from load_tests.chaos.watch import longest_excess_s
from load_tests.fleet_api import held, is_moving, settled, states, with_work, without
from tests.load_tests.chaos.runs import look


def replica(name, running=0, waiting=0, state="running", moving_in=0, moving_out=0):
    moving = {"migrating_in": moving_in, "migrating_out": moving_out}
    return {
        "replica_id": name, "state": state, "running": running, "waiting": waiting, **moving
    }  # fmt: skip


OVERVIEW = {
    "replicas": [
        replica("a", running=3, moving_out=1),
        replica("b", running=1, waiting=2, moving_in=1),
        replica("c", state="starting"),
    ]
}


FULL = {"replicas": [replica("a"), replica("b")]}


def test_as_many_requests_as_streams_have_one_owner_each():
    assert longest_excess_s([look(0, 2), look(1, 1), look(2, 2)]) == 0
    assert longest_excess_s([]) == 0


def test_the_longest_time_of_more_is_told():
    looks = [look(0, 3), look(1, 2), look(2, 3), look(3, 4), look(4.5, 2), look(5, 3)]
    assert longest_excess_s(looks) == pytest.approx(2.5)


def test_one_that_never_ends_counts_as_long_as_it_was_seen():
    assert longest_excess_s([look(0, 2), look(1, 3), look(9, 3)]) == pytest.approx(8)


def test_what_is_down_does_not_count():
    assert held(OVERVIEW) == 6
    assert held(without(OVERVIEW, {"b"})) == 3
    assert states(without(OVERVIEW, {"a", "b"})) == ["starting"]


def test_those_with_work_are_the_ones_to_hit():
    assert with_work(OVERVIEW) == {"a", "b"}


def test_a_move_is_seen_at_both_ends():
    assert is_moving(OVERVIEW, "a", "b")
    assert not is_moving(OVERVIEW, "b", "a")
    assert not is_moving(OVERVIEW, "a", "c")
    assert not is_moving(OVERVIEW, "gone", "b")


def test_a_fleet_is_settled_when_exactly_as_many_run_as_were_asked_for():
    assert settled(FULL, 2)
    assert not settled(FULL, 3)
    assert not settled(OVERVIEW, 3)
    assert not settled({"replicas": []}, 2)


def test_an_update_is_over_when_every_instance_is_another():
    assert settled(FULL, 2, but={"c", "d"})
    assert not settled(FULL, 2, but={"b", "c"})
