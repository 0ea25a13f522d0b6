"""Our metrics, on Ray's Prometheus endpoint as `ray_llumnix_*`. Labels are never request ids."""

from ray.util.metrics import Counter, Gauge, Histogram
from vllm.v1.engine import EngineCoreEvent
from vllm.v1.engine import EngineCoreEventType as Event

from deployments.messages import Report
from deployments.policy.load import InstanceLoad
from migration.snapshot import MigrationRecord

SECONDS = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]


class ReplicaMetrics:
    """What an instance counts; Serve adds its deployment and replica labels."""

    def __init__(self) -> None:
        self._migrations = Counter(
            "llumnix_migrations_total", "Attempts to move a request.", ("reason", "outcome")
        )
        self._downtime = Histogram(
            "llumnix_migration_downtime_seconds", "From parking to commit.", SECONDS
        )
        self._bytes = Counter("llumnix_migration_bytes_total", "KV bytes sent to other instances.")
        self._stages = Histogram(
            "llumnix_migration_stages", "Copy stages of a completed move.", [1, 2, 3, 4, 6, 8]
        )
        self._freeness = Gauge("llumnix_freeness", "Decode steps that the free KV blocks last.")
        self._fragmentation = Gauge(
            "llumnix_fragmentation_ratio",
            "Share of the KV blocks that is free while the head of line waits for memory.",
        )
        self._queue = Histogram(
            "llumnix_queue_seconds", "Waiting in an engine's queue.", SECONDS, ("priority",)
        )
        self._preemptions = Counter("llumnix_preemptions_total", "Requests preempted by vLLM.")

    def observe_migration(self, record: MigrationRecord) -> None:
        """Count one attempt, at its source."""
        self._migrations.inc(1, {"reason": record.reason, "outcome": record.outcome})
        if record.outcome == "completed":
            self._downtime.observe(record.downtime_ms / 1e3)
            self._stages.observe(max(1, record.stages))
        if record.bytes:
            self._bytes.inc(record.bytes)

    def observe(self, report: Report) -> None:
        """Set the gauges from a load report."""
        load = report.load
        self._freeness.set(max(load.freeness, -1e9))  # Prometheus has -Inf, dashboards do not
        self._fragmentation.set(fragmentation(load))

    def observe_events(self, events: list[EngineCoreEvent], priority_class: str) -> None:
        """Count what vLLM says happened to a request, told with its next output."""
        at = {event.type: event.timestamp for event in events}
        queued, scheduled = (at.get(kind) for kind in (Event.QUEUED, Event.SCHEDULED))
        if queued is not None and scheduled is not None:
            self._queue.observe(scheduled - queued, {"priority": priority_class})
        if preempted := sum(event.type == Event.PREEMPTED for event in events):
            self._preemptions.inc(preempted)


def fragmentation(load: InstanceLoad) -> float:
    """Free share of the memory, where a request waits that it is too small for; else 0."""
    free = load.blocks_total - load.blocks_used
    if not load.blocks_total or not load.head_of_line_blocks or load.head_of_line_blocks <= free:
        return 0.0
    return free / load.blocks_total
