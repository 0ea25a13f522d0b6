"""vLLM's gauges over a fleet: those of all replicas that make steps."""

from vllm.v1.metrics.stats import SchedulerStats

from app.fleet_stats import STALE_S, FleetStats


def stats(running: int, usage: float) -> SchedulerStats:
    return SchedulerStats(num_running_reqs=running, num_waiting_reqs=1, kv_cache_usage=usage)


def test_gauges_are_those_of_all_replicas():
    fleet = FleetStats()
    fleet.merged("a", stats(3, 0.5), 0)
    merged = fleet.merged("b", stats(1, 0.1), 1)
    assert (merged.num_running_reqs, merged.num_waiting_reqs) == (4, 2)
    assert merged.kv_cache_usage == 0.3


def test_those_that_wait_for_something_else_count_as_well():
    fleet = FleetStats()
    fleet.merged("a", SchedulerStats(num_skipped_waiting_reqs=2), 0)
    merged = fleet.merged("b", SchedulerStats(num_skipped_waiting_reqs=1), 1)
    assert merged.num_skipped_waiting_reqs == 3


def test_a_replica_that_is_gone_does_not_count_for_ever():
    fleet = FleetStats()
    fleet.merged("gone", stats(7, 0.9), 0)
    assert fleet.merged("b", stats(1, 0.1), STALE_S).num_running_reqs == 1
