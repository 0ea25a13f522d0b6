"""Which requests are let in: bounds on the tokens and on the time that wait for a first token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.admission import Admission
from app.config import PriorityClass

CLASSES = {
    "normal": PriorityClass(max_queued_tokens=100, max_queue_s=10.0),
    "high": PriorityClass(max_queued_tokens=100, max_queue_s=10.0),
    "by_tokens": PriorityClass(max_queued_tokens=100, max_queue_s=None),
    "by_time": PriorityClass(max_queued_tokens=None, max_queue_s=10.0),
    "unbounded": PriorityClass(max_queued_tokens=None, max_queue_s=None),
}


class Queue:
    """One class of an ingress, told in order of time."""

    def __init__(self, name: str = "normal") -> None:
        self.admission = Admission(CLASSES)
        self.name = name
        self.waiting: dict[str, tuple[float, int]] = {}
        self._number = 0

    def offer(self, now: float, tokens: int = 1) -> bool:
        """Whether a new request is let in."""
        if self.admission.check(self.name, tokens, now):
            return False
        self._number += 1
        request_id = f"{self.name}-{self._number}"
        self.admission.arrived(request_id, self.name, tokens, now)
        self.waiting[request_id] = (now, tokens)
        return True

    def leave(self, index: int = 0) -> None:
        """The oldest one, or another, gets its first token."""
        request_id = list(self.waiting)[index]
        self.admission.left(request_id)
        del self.waiting[request_id]

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.waiting.values())

    def full(self, now: float, tokens: int = 1):
        full = self.admission.check(self.name, tokens, now)
        assert full is not None
        return full


def test_what_waits_is_bounded_in_tokens():
    queue = Queue()
    assert queue.offer(0.0, 60)
    assert queue.offer(0.0, 40)
    assert not queue.offer(0.0, 1)
    queue.leave()
    assert queue.offer(0.0, 60)


def test_a_request_larger_than_the_bound_is_let_into_an_empty_queue():
    queue = Queue()
    assert queue.offer(0.0, 5000)
    assert not queue.offer(0.0, 1)


def test_none_is_let_in_while_one_has_waited_too_long_even_if_others_pass_it():
    queue = Queue()
    queue.offer(0.0)
    for second in range(1, 11):
        assert queue.offer(float(second))
        queue.leave(-1)
    assert not queue.offer(10.1)
    queue.leave()
    assert queue.offer(10.1)


@pytest.mark.parametrize(("left_in_2_s", "let_in"), [(2, False), (5, True)])
def test_none_is_let_in_that_would_wait_too_long_at_the_present_pace(left_in_2_s, let_in):
    queue = Queue("by_time")
    for _ in range(20):
        queue.offer(0.0)
    for _ in range(left_in_2_s):
        queue.leave()
    assert queue.offer(2.0) == let_in


def test_a_burst_into_an_idle_fleet_is_let_in_before_its_pace_is_known():
    queue = Queue("by_time")
    assert all(queue.offer(0.0) for _ in range(1000))
    queue.leave()
    assert queue.offer(0.9)


def test_requests_that_get_their_tokens_fast_never_fill_a_queue():
    queue = Queue()
    for second in range(1000):
        assert queue.offer(float(second), 100)
        queue.leave()


def test_classes_have_queues_of_their_own():
    admission = Admission(CLASSES)
    admission.arrived("r1", "normal", 100, 0.0)
    assert admission.check("normal", 1, 0.0)
    assert admission.check("high", 1, 0.0) is None


def test_a_class_without_bounds_is_never_full():
    queue = Queue("unbounded")
    assert all(queue.offer(0.0, 10**9) for _ in range(100))
    assert queue.offer(1e9, 10**9)


def test_a_request_leaves_once():
    queue = Queue()
    queue.offer(0.0, 60)
    queue.offer(0.0, 40)
    queue.admission.left("normal-1")
    queue.admission.left("normal-1")
    queue.admission.left("unheard-of")
    assert queue.admission.check("normal", 61, 0.0)
    assert queue.admission.check("normal", 60, 0.0) is None


def test_a_full_queue_says_what_fills_it_and_how_long_it_will_take_to_drain():
    queue = Queue("by_tokens")
    for _ in range(100):
        queue.offer(0.0)
    for _ in range(20):
        queue.leave()  # in five seconds
    full = queue.full(5.0, tokens=21)
    assert (full.reason, full.retry_after_s) == ("queued_tokens", 20)
    assert full.detail == (
        "the queue of class 'by_tokens' is full: 80 prompt tokens wait; try again in 20 s"
    )


@pytest.mark.parametrize(("waited", "retry_s"), [(0.0, 1), (0.4, 1), (7.2, 8), (1e6, 60)])
def test_while_nothing_drains_the_client_comes_back_after_as_long_again(waited, retry_s):
    queue = Queue("by_tokens")
    queue.offer(0.0, 100)
    assert queue.full(waited).retry_after_s == retry_s


STEPS = st.lists(
    st.tuples(st.floats(0, 4), st.integers(1, 150), st.integers(0, 3), st.integers(0, 10)),
    max_size=60,
)
"""Seconds since the last step, tokens of the request that arrives, how many leave before, which."""


@given(STEPS)
def test_whatever_comes_and_leaves_the_bounds_hold(steps):
    queue, now = Queue(), 0.0
    for seconds, tokens, leaving, index in steps:
        now += seconds
        for _ in range(min(leaving, len(queue.waiting))):
            queue.leave(index % len(queue.waiting))
        before = dict(queue.waiting)
        if queue.offer(now, tokens):
            assert not before or queue.tokens <= 100
            assert all(now - since <= 10.0 for since, _ in before.values())
        else:
            assert before
            assert 1 <= queue.full(now, tokens).retry_after_s <= 60


def longest_wait(overload: float) -> float:
    """In a fleet that gives ten first tokens a second, at so many times as many arrivals."""
    queue, longest, served = Queue("by_time"), 0.0, 0
    for number in range(int(overload * 1200)):
        now = number / (10 * overload)
        while served < int(10 * now):
            served += 1
            if queue.waiting:
                since, _ = next(iter(queue.waiting.values()))
                longest = max(longest, now - since)
                queue.leave()
        queue.offer(now)
    return longest


@pytest.mark.parametrize("overload", [1.5, 2.0, 4.0])
def test_under_steady_overload_those_let_in_wait_about_as_long_as_they_may(overload):
    assert 8 < longest_wait(overload) < 13


def test_one_that_lets_others_pass_closes_its_class_to_nobody_but_counts_in_its_tokens():
    admission = Admission(CLASSES)
    admission.arrived("patient", "normal", 90, 0.0, patient=True)
    assert admission.check("normal", 10, 1000.0) is None
    assert admission.check("normal", 11, 1000.0) is not None
    admission.left("patient")
    assert admission.check("normal", 100, 1000.0) is None
