"""How long a request stood still, from vLLM's events."""

import pytest
from vllm.v1.engine import EngineCoreEvent
from vllm.v1.engine import EngineCoreEventType as Event

from app.stalls import Stalls


def queued(at: float) -> EngineCoreEvent:
    return EngineCoreEvent(Event.QUEUED, at)


def scheduled(at: float) -> EngineCoreEvent:
    return EngineCoreEvent(Event.SCHEDULED, at)


def preempted(at: float) -> EngineCoreEvent:
    return EngineCoreEvent(Event.PREEMPTED, at)


@pytest.fixture
def stalls() -> Stalls:
    """Of a request that waited for two seconds."""
    stalls = Stalls()
    stalls.observe([queued(10.0), scheduled(12.0)], 12.5)
    return stalls


def test_the_queue_is_from_its_arrival_to_its_first_step(stalls: Stalls) -> None:
    assert stalls == Stalls(queue_s=2.0)


def test_a_first_step_that_is_told_later_counts_as_well() -> None:
    stalls = Stalls()
    stalls.observe([queued(10.0)], 11.0)
    stalls.observe([scheduled(12.0)], 12.5)
    assert stalls.queue_s == 2.0


def test_to_be_scheduled_again_after_a_preemption_is_no_queue(stalls: Stalls) -> None:
    stalls.observe([preempted(13.0), scheduled(15.0)], 15.5)
    assert stalls.queue_s == 2.0


def test_a_preemption_lasts_until_the_next_token(stalls: Stalls) -> None:
    stalls.observe([preempted(13.0), scheduled(15.0)], 15.5)
    assert (stalls.preemptions, stalls.preempted_s) == (1, 2.5)


def test_preemptions_of_which_each_was_followed_by_a_token_add_up(stalls: Stalls) -> None:
    stalls.observe([preempted(13.0), scheduled(14.0)], 14.5)
    stalls.observe([], 15.0)
    stalls.observe([preempted(20.0), scheduled(20.5)], 21.0)
    assert (stalls.preemptions, stalls.preempted_s) == (2, 1.5 + 1.0)


def test_two_preemptions_before_the_next_token_are_one_stall(stalls: Stalls) -> None:
    stalls.observe([preempted(13.0), scheduled(14.0), preempted(15.0), scheduled(16.0)], 17.0)
    assert (stalls.preemptions, stalls.preempted_s) == (2, 4.0)


def test_only_preemptions_after_a_move_are_blamed_on_it(stalls: Stalls) -> None:
    stalls.observe([preempted(13.0), scheduled(13.5)], 14.0)
    stalls.moved(20.0)
    stalls.observe([preempted(19.0), scheduled(21.0)], 22.0)  # the source's, told by its new owner
    assert (stalls.preemptions, stalls.preempted_after_move) == (2, 0)
    stalls.observe([preempted(23.0), scheduled(24.0)], 25.0)
    assert (stalls.preemptions, stalls.preempted_after_move) == (3, 1)


def test_a_preemption_after_which_it_moved_on_is_blamed_on_the_move_before(stalls: Stalls) -> None:
    stalls.moved(20.0)
    stalls.moved(24.0)
    stalls.observe([preempted(23.0), scheduled(25.0)], 26.0)
    assert (stalls.preemptions, stalls.preempted_after_move) == (1, 1)


def test_the_admin_form_is_in_milliseconds(stalls: Stalls) -> None:
    stalls.moved(12.9)
    stalls.observe([preempted(13.0), scheduled(13.0)], 13.0012344)
    assert stalls.to_json() == {
        "queue_ms": 2000.0,
        "preemptions": 1,
        "preempted_ms": 1.234,
        "preempted_after_move": 1,
    }
