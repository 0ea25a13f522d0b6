"""Virtual usage and freeness (Llumnix, OSDI'24, Algorithm 1)."""

import math

import pytest

from deployments.policy.load import InstanceLoad, freeness, headroom_of, virtual_usage

HEADROOM = {"high": 50, "batch": 7, "normal": 0}


def usage(used=0, free=100, head=0, full=False, headroom=0, draining=False) -> float:
    return virtual_usage(used, free, head, full, headroom, draining)


def test_running_requests_count_the_blocks_they_hold_and_their_classes_headroom():
    assert usage(used=30) == 30
    assert usage(used=30, headroom=50) == 80


@pytest.mark.parametrize(
    ("classes", "kept"),
    [
        ([], {}),
        (["normal"], {}),
        (["unheard-of"], {}),
        (["high"], {"high": 50}),
        (["high", "normal", "high", "high"], {"high": 50}),
        (["batch", "high"], {"high": 50, "batch": 7}),
    ],
)
def test_each_class_present_keeps_its_headroom_once_however_many_there_are(classes, kept):
    assert headroom_of(classes, HEADROOM) == kept
    assert InstanceLoad("a", "running", headroom_blocks=kept).headroom == sum(kept.values())


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
