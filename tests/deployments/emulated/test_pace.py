"""The emulated accelerator's clock, on one that only moves when it is told to."""

import pytest

from deployments.emulated.pace import CATCH_UP_S, WallPace


class Clock:
    """Time passes while somebody sleeps, or where the test says so."""

    def __init__(self):
        self.now = 1000.0
        self.slept = []

    def sleep(self, seconds):
        self.slept.append(pytest.approx(seconds))
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def pace(clock):
    return WallPace(lambda: clock.now, clock.sleep)


def test_a_step_sleeps_as_long_as_it_takes(clock, pace):
    pace.step(0.05, follows=False)
    assert clock.slept == [0.05]


def test_computing_before_the_first_step_is_not_its_time(clock, pace):
    clock.now += 0.02
    pace.step(0.05, follows=False)
    assert clock.slept == [0.05]


def test_scheduling_between_two_steps_is_absorbed(clock, pace):
    pace.step(0.05, follows=False)
    clock.now += 0.02
    pace.step(0.05, follows=True)
    assert clock.slept == [0.05, 0.03]


def test_a_little_delay_is_made_up_for_by_the_next_steps(clock, pace):
    pace.step(0.05, follows=False)
    ideal = clock.now + 3 * 0.05
    clock.now += 0.05 + CATCH_UP_S - 0.01  # late by 0.09
    for _ in range(3):
        pace.step(0.05, follows=True)
    assert clock.slept == [0.05, 0.01]
    assert clock.now == pytest.approx(ideal)
    assert pace.lost == 0


def test_what_is_too_much_to_make_up_for_is_lost(clock, pace):
    pace.step(0.05, follows=False)
    clock.now += 0.05 + CATCH_UP_S + 0.02
    pace.step(0.05, follows=True)
    pace.step(0.05, follows=True)
    assert clock.slept == [0.05, 0.05]
    assert pace.lost == pytest.approx(CATCH_UP_S + 0.02)


def test_drift_is_the_share_that_was_lost(clock, pace):
    assert pace.drift == 0
    pace.step(1.0, follows=False)
    clock.now += 1.5
    pace.step(1.0, follows=True)
    assert pace.busy == 2.0
    assert pace.drift == pytest.approx(0.25)


def test_an_idle_gap_is_no_drift(clock, pace):
    pace.step(0.05, follows=False)
    clock.now += 60
    pace.step(0.05, follows=False)
    assert clock.slept == [0.05, 0.05]
    assert pace.drift == 0
