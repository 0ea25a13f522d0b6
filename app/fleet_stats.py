"""vLLM's scheduler statistics of many engines as those of one, for its own `/metrics`."""

from dataclasses import replace

from vllm.v1.metrics.stats import SchedulerStats


class FleetStats:
    """Gauges are summed or averaged over the replicas' last words; what counts up is passed on."""

    def __init__(self) -> None:
        self._last: dict[str, SchedulerStats] = {}

    def forget(self, replica_id: str) -> None:
        """This replica is lost, and what it ran with it."""
        self._last.pop(replica_id, None)

    def merged(self, replica_id: str, stats: SchedulerStats) -> SchedulerStats:
        """The fleet's statistics after this replica's step."""
        self._last[replica_id] = stats
        every = self._last.values()
        return replace(
            stats,
            num_running_reqs=sum(s.num_running_reqs for s in every),
            num_waiting_reqs=sum(s.num_waiting_reqs for s in every),
            kv_cache_usage=sum(s.kv_cache_usage for s in every) / len(self._last),
        )
