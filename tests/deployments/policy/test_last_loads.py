"""Where requests go while the Scheduler does not tell it. Times are the test's own."""

import random
from collections import Counter

import pytest

from deployments.messages import Ask
from deployments.policy.last_loads import LOADS_S, LastLoads
from deployments.policy.load import InstanceLoad, freeness


def load(name: str, used: int = 0, running: int = 0, state="running", **rest) -> InstanceLoad:
    free = freeness(100, used, running, 0)
    return InstanceLoad(name, state, 100, used, 16, running, freeness=free, **rest)


def seen(*loads: InstanceLoad, policy: str = "freeness") -> LastLoads:
    """At time 0."""
    last = LastLoads(policy, random.Random(0))
    last.see(loads, now=0)
    return last


def burst(last: LastLoads, n: int, candidates: str = "ab", now: float = 1, **ask) -> Counter[str]:
    """How many of n requests go where; each has two blocks."""
    asks = [Ask(f"r{i}", 32, **ask) for i in range(n)]
    return Counter(last.choose(each, list(candidates), now) for each in asks)


def test_a_request_goes_where_the_policy_says():
    assert burst(seen(load("a", 90, 2), load("b", 10, 1)), 1) == {"b": 1}
    assert burst(seen(load("a", 90, 2), load("b", 10, 3), policy="queue"), 1) == {"a": 1}


@pytest.mark.parametrize("policy", ["freeness", "queue", "round_robin"])
def test_a_burst_spreads_over_equals(policy):
    assert burst(seen(load("a"), load("b"), policy=policy), 20) == {"a": 10, "b": 10}


def test_a_burst_fills_the_freer_one_until_both_are_as_free():
    last = seen(load("a", 60, 6), load("b"))
    assert burst(last, 10) == {"b": 10}
    assert burst(last, 10) == {"b": 7, "a": 3}  # 66 free blocks for 17 requests, 34 for 9


def test_the_headroom_of_a_request_s_class_counts_where_it_went():
    last = seen(load("a"), load("b"))
    assert burst(last, 1, priority_class="high", headroom_tokens=16 * 80) == {"b": 1}
    assert burst(last, 4) == {"a": 4}


def test_new_loads_replace_what_was_counted():
    last = seen(load("a"), load("b", 90, 1))
    burst(last, 20)
    last.see([load("a"), load("b", 90, 1)], now=2)
    assert burst(last, 1) == {"a": 1}


def test_one_that_is_no_candidate_gets_nothing():
    assert burst(seen(load("a", 99, 50), load("dead")), 5, "a") == {"a": 5}


def test_one_that_drains_gets_nothing_as_long_as_another_does_not():
    last = seen(load("a", state="draining"), load("b", 99, 50))
    assert burst(last, 5) == {"b": 5}
    assert burst(last, 5, "ac") == {"c": 5}


def test_ones_that_drain_are_better_than_none():
    last = seen(load("a", state="draining"), load("b", state="draining"))
    assert burst(last, 10) == {"a": 5, "b": 5}


def test_those_of_which_nothing_is_known_take_turns():
    assert burst(seen(), 10) == {"a": 5, "b": 5}


def test_loads_of_long_ago_are_forgotten():
    last = seen(load("a", 99, 50), load("b", 0, state="draining"), load("c"))
    assert burst(last, 5, "abc", now=LOADS_S) == {"c": 5}
    assert burst(last, 9, "abc", now=LOADS_S + 0.1) == {"a": 3, "b": 3, "c": 3}
