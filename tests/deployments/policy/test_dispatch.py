"""Which instance a new request goes to."""

import math
import random
from collections import Counter

import pytest

from deployments.policy.dispatch import POLICIES, Pending, choose, with_pending
from deployments.policy.load import InstanceLoad, freeness


def load(name: str, used: int = 0, running: int = 0, waiting: int = 0, **rest) -> InstanceLoad:
    head = rest.pop("head_of_line_blocks", 0)
    defaults = {
        "state": "running",
        "blocks_total": 100,
        "blocks_used": used,
        "running": running,
        "waiting": waiting,
        "head_of_line_blocks": head,
        "freeness": freeness(100, used + head, running, waiting),
    }
    return InstanceLoad(name, **defaults | rest)


def chosen(policy: str, *loads: InstanceLoad, turn: int = 0) -> str | None:
    best = choose(policy, loads, random.Random(0), turn)
    return best.replica_id if best else None


def test_freeness_goes_to_the_freest_instance():
    assert chosen("freeness", load("a", 40, 4), load("b", 90, 1), load("c", 30, 2)) == "c"


def test_a_new_request_comes_behind_the_whole_queue_and_not_its_head_alone():
    crowded = load("crowded", 40, 4, waiting=3, head_of_line_blocks=10, due_blocks=200)
    full = load("full", 70, 4)
    assert crowded.freeness > full.freeness
    assert chosen("freeness", crowded, full) == "full"


def test_what_prompts_under_way_will_still_take_is_not_free():
    assert chosen("freeness", load("a", 10, 1, due_blocks=85), load("b", 60, 2)) == "b"


def test_a_queue_that_grows_never_makes_an_instance_freer():
    here = load("a", 95, 4, waiting=2, head_of_line_blocks=50, due_blocks=100)
    longer = with_pending(here, [Pending(2)] * 18)
    assert longer.freeness_at_the_end < here.freeness_at_the_end < 0


def test_a_burst_is_spread_over_instances_that_are_full_too():
    pending: dict[str, list[Pending]] = {name: [] for name in "abcd"}
    for turn in range(12):
        full = [
            with_pending(load(name, 95, 4, 2, head_of_line_blocks=50, due_blocks=100), there)
            for name, there in pending.items()
        ]
        best = chosen("freeness", *full, turn=turn)
        assert best is not None
        pending[best].append(Pending(2))
    assert [len(there) for there in pending.values()] == [3, 3, 3, 3]


def test_freeness_prefers_the_shorter_queue_among_equals():
    queued = load("a", waiting=3, freeness=10.0)
    assert chosen("freeness", queued, load("b", freeness=10.0)) == "b"


@pytest.mark.parametrize("policy", ["freeness", "queue", "round_robin"])
def test_equals_are_served_in_turn(policy):
    equals = [load("a"), load("b"), load("c")]
    assert [chosen(policy, *equals, turn=turn) for turn in range(4)] == ["a", "b", "c", "a"]


def test_queue_goes_to_the_fewest_requests_whatever_their_size():
    assert chosen("queue", load("a", 1, 3), load("b", 99, 1, 1), load("c", 1, 1, 2)) == "b"


def test_round_robin_looks_at_nothing_but_the_turn():
    assert chosen("round_robin", load("a", 99, 50), load("b")) == "a"


def test_power_of_two_takes_the_less_loaded_of_the_two_it_drew():
    loads = [load("busy", running=9), load("idle")]
    for seed in range(20):
        best = choose("power_of_two", loads, random.Random(seed), 0)
        assert best is not None
        assert best.replica_id == "idle"


def test_power_of_two_draws_every_instance_now_and_then():
    loads, rng = [load(name) for name in "abcd"], random.Random(1)
    drawn = {best.replica_id for _ in range(100) if (best := choose("power_of_two", loads, rng, 0))}
    assert drawn == set("abcd")


def with_headroom(name: str, used: int, running: int = 1) -> InstanceLoad:
    """One that has urgent requests and is therefore not free at all."""
    free = freeness(100, used + 90, running, 0)
    return load(name, used, running, headroom_blocks={"high": 90}, freeness=free)


def roomiest(*loads: InstanceLoad, policy: str = "freeness", turn: int = 0) -> str:
    best = choose(policy, loads, random.Random(0), turn, keeps_headroom=True)
    assert best is not None
    return best.replica_id


def test_what_keeps_headroom_goes_where_most_blocks_are_whatever_is_kept_free_there():
    assert roomiest(load("free", 40, 1), with_headroom("urgent", used=20, running=9)) == "urgent"
    assert roomiest(load("free", 20, 9), with_headroom("urgent", used=40, running=1)) == "free"


def test_blocks_that_prompts_will_take_are_no_room():
    assert roomiest(load("a", 10, due_blocks=60), load("b", 40, due_blocks=20)) == "b"


def test_what_keeps_headroom_takes_turns_among_equals():
    assert [roomiest(load("a"), load("b"), turn=turn) for turn in range(3)] == ["a", "b", "a"]


def test_other_requests_avoid_what_is_kept_free():
    assert chosen("freeness", load("free", 40, 1), with_headroom("urgent", used=20)) == "free"


def test_headroom_yields_where_all_others_are_full():
    urgent = with_headroom("urgent", used=15)
    for used, goes_to in ((99, "free"), (100, "urgent")):
        assert chosen("freeness", load("free", used, 1), urgent) == goes_to


def test_full_instances_are_filled_up_where_headroom_has_been_taken_already():
    taken = with_headroom("urgent", used=100)
    assert chosen("freeness", taken, load("full", 100, 1)) == "full"
    assert chosen("freeness", taken, load("queue", 100, 1, 1, due_blocks=9)) == "urgent"


def test_policies_that_know_no_freeness_are_the_same_for_all():
    loads = load("a", 10, 3), load("b", 90, 1)
    assert roomiest(*loads, policy="queue") == chosen("queue", *loads) == "b"


@pytest.mark.parametrize("policy", POLICIES)
def test_a_single_instance_gets_it_all(policy):
    assert chosen(policy, load("a", 99, 50, 9), turn=7) == "a"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("state", ["starting", "draining"])
def test_a_starting_or_draining_instance_gets_nothing(policy, state):
    idle = load("idle", state=state, freeness=1e9)
    for turn in range(4):
        assert chosen(policy, idle, load("busy", 99, 50, 9), turn=turn) == "busy"
    assert chosen(policy, idle) is None


@pytest.mark.parametrize("policy", POLICIES)
def test_without_instances_nothing_is_chosen(policy):
    assert chosen(policy) is None


def test_nothing_pending_changes_nothing():
    here = load("a", 40, 4)
    assert with_pending(here, []) == here


def test_a_pending_request_that_fits_counts_as_running():
    after = with_pending(load("a", 40, 2), [Pending(10)])
    assert (after.blocks_used, after.running, after.waiting) == (50, 3, 0)
    assert after.freeness == pytest.approx(50 / 3)


def test_the_first_pending_request_that_does_not_fit_is_the_head_of_line():
    after = with_pending(load("a", 95, 1), [Pending(10), Pending(20)])
    assert (after.running, after.waiting, after.head_of_line_blocks) == (1, 2, 10)
    assert after.freeness == pytest.approx((100 - 95 - 10) / 2)


def test_what_comes_behind_a_queue_queues_even_if_it_would_fit():
    after = with_pending(load("a", 50, 1, waiting=1, head_of_line_blocks=60), [Pending(1)])
    assert (after.blocks_used, after.waiting, after.head_of_line_blocks) == (50, 2, 60)
    assert after.freeness == pytest.approx((100 - 50 - 60) / 2)


def test_headroom_that_was_reported_stays_counted():
    kept = load("a", 40, 2, freeness=freeness(100, 40 + 30, 2, 0), headroom_blocks={"high": 30})
    after = with_pending(kept, [Pending(10)])
    assert after.freeness == pytest.approx((100 - 40 - 30 - 10) / 3)


URGENT = Pending(10, "high", headroom_blocks=30)


def test_a_pending_request_brings_its_class_s_headroom_once():
    for pending in ([URGENT], [URGENT, Pending(0, "high", headroom_blocks=30)]):
        after = with_pending(load("a", 40, 1), pending)
        assert (after.headroom, after.staying) == (30, len(pending))
        assert after.freeness == pytest.approx((100 - 40 - 10 - 30) / (1 + len(pending)))


def test_headroom_that_is_there_already_is_not_counted_again():
    reported = load("a", 40, 1, headroom_blocks={"high": 30}, staying=1, freeness=30.0)
    after = with_pending(reported, [URGENT])
    assert (after.headroom, after.staying) == (30, 2)
    assert after.freeness == pytest.approx((100 - 40 - 30 - 10) / 2)


def test_a_head_of_line_that_is_on_its_way_came_last_of_all():
    assert with_pending(load("a", 95, 1), [Pending(10)]).head_of_line_since == math.inf
    queue = load("a", 95, 1, waiting=1, head_of_line_blocks=8, head_of_line_since=7.0)
    assert with_pending(queue, [Pending(10)]).head_of_line_since == 7.0


def test_what_is_pending_behind_a_queue_is_due_there():
    queue = load("a", 50, 1, waiting=1, head_of_line_blocks=60, due_blocks=60)
    assert with_pending(queue, [Pending(7), Pending(8)]).due_blocks == 75
    assert with_pending(load("b"), [Pending(7)]).due_blocks == 0


def test_a_draining_instance_stays_infinitely_unfree():
    draining = load("a", 40, 2, state="draining", freeness=-math.inf)
    assert with_pending(draining, [Pending(10)]).freeness == -math.inf


def test_a_burst_spreads_over_equal_instances():
    pending: dict[str, list[Pending]] = {name: [] for name in "abc"}
    for turn in range(30):
        expected = [with_pending(load(name), arrivals) for name, arrivals in pending.items()]
        best = choose("freeness", expected, random.Random(0), turn)
        assert best is not None
        pending[best.replica_id].append(Pending(3))
    assert Counter({name: len(arrivals) for name, arrivals in pending.items()}) == Counter(
        a=10, b=10, c=10
    )
