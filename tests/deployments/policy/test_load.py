"""Virtual usage and freeness (Llumnix, OSDI'24, Algorithm 1)."""

import math

import pytest

from deployments.policy.load import freeness, virtual_usage

HEADROOM = {"high": 50, "normal": 0}


def usage(used=0, free=100, head=0, full=False, classes=(), draining=False) -> float:
    return virtual_usage(used, free, head, full, classes, HEADROOM, draining)


def test_running_requests_count_the_blocks_they_hold():
    assert usage(used=30, classes=["normal", "normal"]) == 30


def test_a_class_with_headroom_counts_it_once_however_many_of_it_run():
    assert usage(used=30, classes=["high"]) == 80
    assert usage(used=30, classes=["high", "high", "high", "normal"]) == 80


def test_the_headroom_of_an_absent_class_does_not_count():
    assert usage(used=30, classes=["normal"]) == 30


def test_every_class_present_keeps_its_own_headroom():
    several = {"high": 50, "batch": 7}
    assert virtual_usage(10, 90, 0, False, ["high", "batch"], several, False) == 67


def test_a_class_that_nobody_configured_has_no_headroom():
    assert usage(used=30, classes=["unheard-of"]) == 30


def test_the_head_of_line_counts_its_demand():
    assert usage(used=30, head=12) == 42


def test_a_draining_instance_carries_the_infinite_fake_request():
    assert usage(used=0, draining=True) == math.inf


def test_free_blocks_behind_a_full_batch_are_not_free_to_the_head_of_line():
    assert usage(used=30, free=70, head=12, full=True) == 30 + 12 + 70


def test_a_full_batch_with_an_empty_queue_counts_as_usual():
    assert usage(used=30, free=70, full=True) == 30


@pytest.mark.parametrize(
    ("running", "waiting", "expected"),
    [(4, 0, 10.0), (3, 1, 10.0), (3, 9, 10.0), (1, 0, 40.0), (0, 0, 40.0), (0, 5, 40.0)],
)
def test_freeness_is_the_steps_that_the_free_blocks_last_for_the_batch_and_its_head_of_line(
    running, waiting, expected
):
    assert freeness(100, 60, running, waiting) == expected


def test_freeness_is_negative_where_more_is_wanted_than_there_is():
    assert freeness(100, 130, 2, 1) == -10


def test_a_draining_instance_is_infinitely_unfree():
    assert freeness(100, math.inf, 3, 0) == -math.inf
