"""The global scheduler: what it believes of the fleet, and what it orders."""

import math
import random
from collections import Counter

from deployments.messages import Ask, Orders, Report
from deployments.policy import global_scheduler
from deployments.policy.global_scheduler import (
    PAIRING_INTERVAL_S,
    PENDING_S,
    SILENT_S,
    STARTING_S,
    GlobalScheduler,
)
from deployments.policy.load import InstanceLoad, freeness
from deployments.policy.pairing import PairingRule, Target

RULE = PairingRule(out_threshold=10, in_threshold=20, min_gain=5)
LATER = PAIRING_INTERVAL_S


def scheduler(rule: PairingRule | None = RULE, policy: str = "freeness") -> GlobalScheduler:
    return GlobalScheduler(policy, rule, random.Random(0))


def load(name: str, used: int = 0, running: int = 0, **rest) -> InstanceLoad:
    defaults = {
        "state": "running",
        "blocks_total": 100,
        "block_size": 16,
        "blocks_used": used,
        "running": running,
        "freeness": freeness(100, used, running, 0),
    }
    return InstanceLoad(name, **defaults | rest)


def draining(name: str, running: int = 1) -> InstanceLoad:
    return load(name, 10, running, state="draining", freeness=-math.inf)


def asks(count: int, prompt_tokens: int = 160) -> list[Ask]:
    return [Ask(f"r{number}", prompt_tokens) for number in range(count)]


def targets(orders: Orders) -> list[str]:
    return [target.replica_id for target in orders.targets]


def freeness_of(fleet: GlobalScheduler, name: str, now: float) -> float:
    return {x.replica_id: x.freeness for x in fleet.choose([], now).loads}[name]


def test_an_empty_fleet_chooses_nothing():
    assert scheduler().choose(asks(2), now=0).chosen == (None, None)


def test_requests_of_one_batch_spread():
    fleet = scheduler()
    for name in "ab":
        fleet.report(Report(load(name)), now=0)
    assert Counter(fleet.choose(asks(8), now=0).chosen) == Counter(a=4, b=4)


def test_requests_of_many_batches_between_two_reports_spread():
    fleet = scheduler()
    for name in "ab":
        fleet.report(Report(load(name)), now=0)
    chosen = [fleet.choose([ask], now=0).chosen[0] for ask in asks(8)]
    assert Counter(chosen) == Counter(a=4, b=4)


def test_the_decision_carries_the_loads_with_its_own_choices_counted():
    fleet = scheduler()
    fleet.report(Report(load("a")), now=0)
    (after,) = fleet.choose(asks(2, prompt_tokens=17), now=0).loads
    assert (after.running, after.blocks_used) == (2, 4)


def test_an_urgent_request_on_its_way_keeps_others_away_at_once():
    fleet = scheduler()
    for name in "ab":
        fleet.report(Report(load(name)), now=0)
    urgent = Ask("r0", 160, priority_class="high", headroom_tokens=16 * 80)
    ((host,), (after, *_)) = (
        fleet.choose([urgent], now=0).chosen,
        sorted(fleet.choose([], now=0).loads, key=lambda x: x.freeness),
    )
    assert (after.replica_id, after.headroom_blocks, after.freeness) == (host, {"high": 80}, 10)
    assert host not in fleet.choose(asks(5), now=0).chosen


def test_the_next_urgent_request_goes_to_the_one_with_most_room():
    fleet = scheduler()
    fleet.report(Report(load("a", 25, 1)), now=0)
    fleet.report(Report(load("b", 20, 9, headroom_blocks={"high": 80}, freeness=0.0)), now=0)
    urgent = [Ask(f"r{n}", 160, priority_class="high", headroom_tokens=1280) for n in range(3)]
    assert fleet.choose(urgent, now=0).chosen == ("b", "a", "b")


def test_a_reported_arrival_is_no_longer_pending():
    fleet = scheduler()
    fleet.report(Report(load("a")), now=0)
    fleet.choose(asks(2), now=0)
    fleet.report(Report(load("a", 10, 1), arrived=("r0",)), now=0.1)
    (after,) = fleet.choose([], now=0.1).loads
    assert (after.running, after.blocks_used) == (2, 20)


def test_a_pending_request_that_never_arrives_is_forgotten():
    fleet = scheduler()
    fleet.report(Report(load("a")), now=0)
    fleet.choose(asks(1), now=0)
    fleet.report(Report(load("a")), now=PENDING_S)
    assert freeness_of(fleet, "a", now=PENDING_S) == 90
    assert freeness_of(fleet, "a", now=PENDING_S + 0.1) == 100


def test_an_arrival_nobody_was_asked_about_is_no_problem():
    assert scheduler().report(Report(load("a"), arrived=("stray",)), now=0) == Orders()


def test_a_silent_instance_is_forgotten():
    fleet = scheduler()
    fleet.report(Report(load("a")), now=0)
    fleet.report(Report(load("b", 90, 1)), now=SILENT_S)
    assert fleet.choose(asks(1), now=SILENT_S + 0.1).chosen == ("b",)
    assert [x.replica_id for x in fleet.view(SILENT_S + 0.1).loads] == ["b"]


def test_a_silent_instance_that_speaks_again_is_back():
    fleet = scheduler()
    fleet.report(Report(load("a")), now=0)
    assert fleet.choose(asks(1), now=SILENT_S + 1).chosen == (None,)
    fleet.report(Report(load("a")), now=SILENT_S + 2)
    assert fleet.choose(asks(1), now=SILENT_S + 2).chosen == ("a",)


def test_a_starting_instance_may_be_silent_for_longer_and_gets_nothing():
    fleet = scheduler()
    fleet.report(Report(InstanceLoad("a", "starting")), now=0)
    assert fleet.choose(asks(1), now=SILENT_S + 1).chosen == (None,)
    assert [x.state for x in fleet.view(SILENT_S + 1).loads] == ["starting"]
    assert fleet.view(STARTING_S + 1).loads == ()


def test_a_starting_that_comes_after_running_is_ignored():
    fleet = scheduler()
    fleet.report(Report(load("a")), now=0)
    fleet.report(Report(InstanceLoad("a", "starting")), now=0.1)
    assert fleet.choose(asks(1), now=0.1).chosen == ("a",)


def test_a_request_goes_to_an_instance_of_the_model_that_it_was_prepared_for():
    fleet = scheduler()
    fleet.report(Report(load("old", 90, 5, fingerprint="7b")), now=0)
    fleet.report(Report(load("new", fingerprint="13b")), now=0)
    both = [Ask("r0", 160, "7b"), Ask("r1", 160, "13b"), Ask("r2", 160, "70b")]
    assert fleet.choose(both, now=0).chosen == ("old", "new", None)


def test_a_request_goes_to_no_instance_that_it_should_avoid():
    fleet = scheduler()
    fleet.report(Report(load("hangs")), now=0)
    fleet.report(Report(load("well", 90, 5)), now=0)
    both = [Ask("r0", 160, avoid=frozenset(avoid)) for avoid in (["hangs"], ["hangs", "well"])]
    assert fleet.choose(both, now=0).chosen == ("well", None)


def test_a_draining_instance_gets_nothing_new():
    fleet = scheduler()
    fleet.report(Report(draining("a")), now=0)
    fleet.report(Report(load("b", 99, 50)), now=0)
    assert fleet.choose(asks(3), now=0).chosen == ("b", "b", "b")


def test_a_crowded_instance_is_told_where_to_hand_over_and_the_other_nothing():
    fleet = scheduler()
    fleet.report(Report(load("free")), now=0)
    orders = fleet.report(Report(load("crowded", 99, 1)), now=LATER)
    assert orders == Orders((Target("free", 100 - RULE.in_threshold),))
    assert fleet.report(Report(load("free")), now=LATER) == Orders()


def test_orders_end_when_the_instances_are_no_longer_paired():
    fleet = scheduler()
    fleet.report(Report(load("free")), now=0)
    fleet.report(Report(load("crowded", 99, 1)), now=LATER)
    assert fleet.report(Report(load("crowded", 50, 1)), now=2 * LATER) == Orders()


def test_nobody_is_sent_to_an_instance_that_fell_silent():
    fleet = scheduler()
    fleet.report(Report(load("free")), now=0)
    crowded = Report(load("crowded", 99, 1))
    assert targets(fleet.report(crowded, now=SILENT_S)) == ["free"]
    assert fleet.report(crowded, now=SILENT_S + 2 * LATER) == Orders()


def test_what_is_on_its_way_to_a_free_instance_is_counted_before_it_is_paired():
    fleet = scheduler()
    fleet.report(Report(load("free", 70, 1)), now=0)
    fleet.choose(asks(1, prompt_tokens=16 * 20), now=0)
    assert fleet.report(Report(load("crowded", 99, 1)), now=LATER) == Orders()


def test_a_draining_instance_is_evacuated_however_free_it_is():
    fleet = scheduler()
    fleet.report(Report(load("other", 10, 1)), now=0)
    assert targets(fleet.report(Report(draining("leaving")), now=LATER)) == ["other"]


def test_an_instance_that_begins_to_drain_is_paired_at_once():
    fleet = scheduler()
    fleet.report(Report(load("other", 10, 1)), now=0)
    fleet.report(Report(load("leaving", 10, 1)), now=0)
    assert targets(fleet.report(Report(draining("leaving")), now=0.1 * LATER)) == ["other"]


def test_an_evacuated_instance_has_no_orders():
    fleet = scheduler()
    fleet.report(Report(load("other")), now=0)
    fleet.report(Report(draining("leaving")), now=LATER)
    assert fleet.report(Report(draining("leaving", running=0)), now=2 * LATER) == Orders()


def test_without_a_rule_nobody_is_ordered_anything():
    fleet = scheduler(rule=None)
    fleet.report(Report(load("free")), now=0)
    assert fleet.report(Report(load("crowded", 99, 1)), now=LATER) == Orders()


def test_migrations_are_counted_once_in_a_fleet_of_any_size(monkeypatch):
    monkeypatch.setattr(global_scheduler, "COUNTED_MAX", 2)
    fleet = scheduler()
    for now in (0, 1, 2):
        for name in "abcdef":
            fleet.report(Report(load(name), migrations={"completed": 1}), now=now)
    assert fleet.view(now).migrations == {"completed": 6}


def test_migrations_of_the_dead_stay_counted():
    fleet = scheduler()
    fleet.report(Report(load("a"), migrations={"completed": 2, "refused": 1}), now=0)
    fleet.report(Report(load("b"), migrations={"completed": 3}), now=SILENT_S + 1)
    assert fleet.view(SILENT_S + 1).migrations == {"completed": 5, "refused": 1}


def test_an_instance_that_comes_back_is_counted_once():
    fleet = scheduler()
    fleet.report(Report(load("a"), migrations={"completed": 2}), now=0)
    fleet.report(Report(load("b")), now=SILENT_S + 1)
    fleet.report(Report(load("a"), migrations={"completed": 3, "aborted": 1}), now=SILENT_S + 2)
    assert fleet.view(SILENT_S + 2).migrations == {"completed": 3, "aborted": 1}
