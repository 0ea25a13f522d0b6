"""vLLM's scheduler statistics of many engines as those of one, for its own `/metrics`."""

from dataclasses import replace

from vllm.v1.metrics.stats import SchedulerStats

STALE_S = 60.0
"""A replica that made no step for so long is idle, or gone: it counts no more."""


class FleetStats:
    """Gauges are summed or averaged over the replicas' last words; what counts up is passed on."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[SchedulerStats, float]] = {}

    def merged(self, replica_id: str, stats: SchedulerStats, now: float) -> SchedulerStats:
        """The fleet's statistics after this replica's step."""
        self._last[replica_id] = stats, now
        self._last = {k: v for k, v in self._last.items() if now - v[1] < STALE_S}
        every = [last for last, _ in self._last.values()]
        return replace(
            stats,
            num_running_reqs=sum(s.num_running_reqs for s in every),
            num_waiting_reqs=sum(s.num_waiting_reqs for s in every),
            num_skipped_waiting_reqs=sum(s.num_skipped_waiting_reqs for s in every),
            kv_cache_usage=sum(s.kv_cache_usage for s in every) / len(every),
        )
