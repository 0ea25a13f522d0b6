"""Which replicas are lost or hang, by what was heard of them and when."""

import pytest

from app.vitals import LATE_S, LOST_S, QUIET_S, Vitals

HANG_S = 5.0


@pytest.fixture
def vitals():
    """With a replica `a` that has work since 100 s."""
    vitals = Vitals(HANG_S)
    assert vitals.watch({"a"}, 100) == []
    return vitals


def test_who_says_nothing_for_too_long_hangs_and_that_is_found_once(vitals):
    assert vitals.watch({"a"}, 100 + HANG_S) == []
    assert vitals.watch({"a"}, 101 + HANG_S) == ["a"]
    assert vitals.watch({"a"}, 102 + HANG_S) == []
    assert vitals.avoid(102 + HANG_S) == {"a"}


def test_who_speaks_now_and_then_does_not_hang(vitals):
    for now in range(100, 200, 4):
        vitals.heard("a", now)
        assert vitals.watch({"a"}, now + 4) == []


def test_who_hangs_is_back_when_it_speaks_and_may_hang_again(vitals):
    vitals.watch({"a"}, 110)
    vitals.heard("a", 111)
    assert vitals.avoid(111) == frozenset()
    assert vitals.watch({"a"}, 112) == []
    assert vitals.watch({"a"}, 117) == ["a"]


def test_who_answers_was_alive_when_its_present_step_began(vitals):
    vitals.heard("a", 104, step_s=3.0)
    assert vitals.watch({"a"}, 101 + HANG_S) == []
    assert vitals.watch({"a"}, 102 + HANG_S) == ["a"]


def test_an_answer_takes_nothing_back_of_what_was_heard(vitals):
    vitals.heard("a", 104)
    vitals.heard("a", 104.1, step_s=3.0)
    assert vitals.watch({"a"}, 104 + HANG_S) == []


def test_an_answer_in_the_middle_of_a_step_that_takes_too_long_does_not_help(vitals):
    vitals.watch({"a"}, 110)
    vitals.heard("a", 110, step_s=HANG_S + 1)
    assert vitals.avoid(110) == {"a"}
    vitals.heard("a", 111, step_s=0.1)
    assert vitals.avoid(111) == frozenset()


def test_who_is_quiet_is_asked(vitals):
    vitals.watch({"a", "b"}, 100)
    vitals.heard("a", 101)
    assert list(vitals.quiet(100 + QUIET_S)) == []
    assert list(vitals.quiet(100.5 + QUIET_S)) == ["b"]
    assert set(vitals.quiet(101.5 + QUIET_S)) == {"a", "b"}


def test_who_has_no_work_is_not_watched_unless_it_hangs(vitals):
    vitals.watch({"a", "b"}, 101 + HANG_S)
    vitals.watch((), 110)
    assert list(vitals.quiet(120)) == ["a"]


def test_who_gets_work_again_begins_anew(vitals):
    vitals.watch((), 101)
    assert vitals.watch({"a"}, 200) == []
    assert list(vitals.quiet(200)) == []


def test_who_is_lost_is_avoided_until_nobody_knows_it_any_more(vitals):
    vitals.lost("a", 104)
    assert vitals.avoid(104) == vitals.avoid(103 + LOST_S) == {"a"}
    assert vitals.avoid(104 + LOST_S) == frozenset()


def test_who_is_lost_neither_hangs_nor_is_asked(vitals):
    vitals.watch({"a"}, 110)
    vitals.lost("a", 111)
    for now in (112, 120):
        assert vitals.watch({"a"}, now) == []
        assert list(vitals.quiet(now)) == []


def test_nothing_is_held_against_anybody_for_the_time_the_ingress_stood_still(vitals):
    vitals.overslept(150)
    assert vitals.watch({"a"}, 150 + HANG_S) == []
    assert vitals.watch({"a"}, 151 + HANG_S) == ["a"]


def test_what_is_heard_of_a_lost_one_was_on_its_way_unless_it_comes_late(vitals):
    vitals.lost("a", 104)
    vitals.heard("a", 104 + LATE_S)
    assert vitals.gone(105 + LATE_S) == {"a"}
    vitals.heard("a", 105 + LATE_S)
    assert (vitals.gone(106 + LATE_S), vitals.avoid(106 + LATE_S)) == (set(), frozenset())
