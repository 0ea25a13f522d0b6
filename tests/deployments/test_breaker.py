"""When requests ask the Scheduler, and when it is probed. Times are the test's own."""

import pytest

from deployments.breaker import PAUSE_S, SETTLING_S, Breaker


@pytest.fixture
def broken() -> Breaker:
    """Since time 0."""
    breaker = Breaker()
    breaker.failed(0)
    return breaker


def test_a_scheduler_that_never_failed_is_asked_and_not_probed():
    breaker = Breaker()
    assert breaker.closed
    assert not breaker.wants_probe(1000)


def test_after_a_failure_it_is_not_asked_until_a_probe_is_answered(broken):
    assert not broken.closed
    broken.answered(knows_all=True, now=1)
    assert broken.closed
    assert not broken.wants_probe(1000)


def test_a_probe_waits_for_a_pause_after_each_failure_and_each_answer(broken):
    assert not broken.wants_probe(0.9 * PAUSE_S)
    assert broken.wants_probe(PAUSE_S)
    broken.failed(PAUSE_S)
    assert not broken.wants_probe(1.9 * PAUSE_S)
    assert broken.wants_probe(2 * PAUSE_S)
    broken.answered(knows_all=False, now=2 * PAUSE_S)
    assert not broken.wants_probe(2.9 * PAUSE_S)
    assert broken.wants_probe(3 * PAUSE_S)


def test_a_scheduler_that_does_not_know_all_is_not_asked_until_it_does(broken):
    broken.answered(knows_all=False, now=1)
    assert not broken.closed
    broken.answered(knows_all=True, now=1 + PAUSE_S)
    assert broken.closed


def test_whom_it_never_hears_of_is_not_waited_for(broken):
    broken.answered(knows_all=False, now=1)
    broken.answered(knows_all=False, now=1 + SETTLING_S)
    assert broken.closed


def test_a_scheduler_that_fails_again_has_to_learn_again(broken):
    broken.answered(knows_all=False, now=1)
    broken.failed(2)
    broken.answered(knows_all=False, now=1 + SETTLING_S)
    assert not broken.closed
