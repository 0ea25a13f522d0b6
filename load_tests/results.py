"""What is kept of a run: JSON under the keys of `vllm bench serve --save-result --save-detailed`.

As there, `*_ms` are milliseconds and the lists have one entry for each request, failed ones too;
other times are seconds from the start of the run. Of the inter-token latencies only the statistics
are kept (the list would make 20 MB for 10,000 requests). What vLLM's tools do not know follows
after their keys.
"""

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from deployments.policy.load import InstanceLoad
from load_tests.metrics import spread
from load_tests.outcome import Run, Sample, Served
from migration.snapshot import MigrationRecord

POINTS = 600
"""Points of a timeline, at most."""

Result = dict[str, Any]
"""What `to_json` returns and `load` reads."""

Cells = dict[tuple[str, float], Result]
"""Results of one scenario on one backend, by policy and rate (requests/s)."""


def save(run: Run, folder: Path) -> Result:
    """Writes `<scenario>/<backend>-<policy>-<rate>.json`. Returns what it wrote."""
    path = folder / run.scenario / f"{run.backend}-{run.policy}-{run.rate:g}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = to_json(run)
    unfinished = path.with_suffix(".part")  # of a run that is killed here, no half is read
    unfinished.write_text(json.dumps(result) + "\n")
    unfinished.replace(path)
    return result


def load(path: Path) -> Result:
    """A result that `save` wrote."""
    result: Result = json.loads(path.read_text())
    return result


def load_all(folder: Path, backend: str) -> Cells:
    """The results of a backend in the folder of a scenario, the lower rates first."""
    results = map(load, sorted(folder.glob(f"{backend}-*.json")))
    cells = {(result["policy"], result["request_rate"]): result for result in results}
    return dict(sorted(cells.items(), key=lambda item: item[0][1]))


def scenarios_below(folder: Path) -> list[Path]:
    """Each scenario's folder of results."""
    return sorted(path for path in folder.iterdir() if path.is_dir())


def runs_below(folder: Path, backend: str) -> Iterator[tuple[str, str, float, Result]]:
    """(scenario, policy, rate, result) of all scenarios below `folder`, one after the other."""
    for scenario in scenarios_below(folder):
        for (policy, rate), result in load_all(scenario, backend).items():
            yield scenario.name, policy, rate, result


def to_json(run: Run) -> Result:
    """vLLM's keys, then ours. A request that failed counts in no latency and no throughput."""
    good = [served for served in run.served if _completed(served)]
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "backend": run.backend,
        "model_id": run.model_id,
        "num_prompts": len(run.served),
        "request_rate": run.rate,
        "max_concurrency": None,
        "duration": run.duration,
        "failed": len(run.served) - len(good),
        **_throughput(good, run.duration),
        **_latencies(good),
        **spread("itl", (later - sooner for s in good for sooner, later in pairwise(s.tokens))),
        **_lists(run.served),
        "scenario": run.scenario,
        "policy": run.policy,
        "instances": run.instances,
        **_instances(run.samples, run.duration),
        **spread("queue", [served.queue_s for served in good]),
        **_preemptions(run.served, good),
        **_migrations(run),
        "priorities": _priorities(good),
        "fragmentation": _mean_fragmentation(run.samples, run.duration),
        "timeline": _timeline(run.samples),
        "facts": run.facts,
    }


def fragmentation(loads: Iterable[InstanceLoad]) -> float:
    """Share of the cluster's memory that waits for nothing but being in one place; 0 to 1.

    It is what heads of line demand, and do not get where they are, although the free blocks of all
    instances would do: the smallest demands first, as many as those blocks hold (Llumnix, OSDI'24).
    """
    running = [load for load in loads if load.state == "running"]
    total = sum(load.blocks_total for load in running)
    free = sum(map(_free, running))
    unmet = sorted(x.head_of_line_blocks for x in running if x.head_of_line_blocks > _free(x))
    fitting = max(demand for demand in accumulate(unmet, initial=0) if demand <= free)
    return fitting / total if total else 0.0


def _free(load: InstanceLoad) -> int:
    return load.blocks_total - load.blocks_used


def _completed(served: Served) -> bool:
    return not served.error and len(served.tokens) > 0


def _ttft(served: Served) -> float:
    return served.tokens[0] - served.arrival


def _tpot(served: Served) -> float:
    return (served.tokens[-1] - served.tokens[0]) / (len(served.tokens) - 1)


def _latency(served: Served) -> float:
    return served.tokens[-1] - served.arrival


def _throughput(good: Sequence[Served], duration: float) -> Result:
    input_tokens = sum(served.input_tokens for served in good)
    output_tokens = sum(len(served.tokens) for served in good)
    return {
        "completed": len(good),
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(good) / duration,
        "output_throughput": output_tokens / duration,
        "total_token_throughput": (input_tokens + output_tokens) / duration,
    }


def _latencies(good: Sequence[Served]) -> dict[str, float]:
    return {
        **spread("ttft", map(_ttft, good)),
        **spread("tpot", (_tpot(served) for served in good if len(served.tokens) > 1)),
        **spread("e2el", map(_latency, good)),
    }


def _lists(served: Sequence[Served]) -> dict[str, list[Any]]:
    """As vLLM has it, a failed request has no output and a TTFT of 0."""
    return {
        "input_lens": [s.input_tokens for s in served],
        "output_lens": [len(s.tokens) if _completed(s) else 0 for s in served],
        "start_times": [round(s.arrival, 6) for s in served],
        "ttfts": [round(_ttft(s), 6) if _completed(s) else 0.0 for s in served],
        "errors": [s.error for s in served],
    }


def _preemptions(served: Sequence[Served], good: Sequence[Served]) -> Result:
    """`preemption_loss` is over all requests that completed, `preempted_loss` over those hit."""
    return {
        "preemptions": sum(s.preemptions for s in served),
        "preempted_requests": sum(s.preemptions > 0 for s in served),
        **spread("preemption_loss", [s.preempted_s for s in good]),
        **spread("preempted_loss", [s.preempted_s for s in good if s.preemptions]),
    }


def _migrations(run: Run) -> Result:
    """`moves` are the completed ones: [at, from, to, request id, blocks]."""
    completed = [move for move in run.moves if move.outcome == "completed"]
    return {
        "migrations": _counts(run.moves),
        **spread("migration_downtime", [move.downtime_ms / 1000 for move in completed]),
        "moved_requests": sum(served.moves > 0 for served in run.served),
        "preempted_after_move": sum(served.preempted_after_move for served in run.served),
        "moves": [
            [round(m.at, 3), m.source, m.destination, m.request_id, m.blocks] for m in completed
        ],
    }


def _counts(moves: Sequence[MigrationRecord]) -> Result:
    counts = Counter(move.outcome for move in moves)
    reasons = sorted({move.reason for move in moves})
    return {
        **{outcome: counts[outcome] for outcome in ("completed", "refused", "aborted")},
        "by_reason": {
            reason: Counter(move.outcome for move in moves if move.reason == reason)
            for reason in reasons
        },
    }


def _priorities(good: Sequence[Served]) -> dict[str, Result]:
    """Latencies of each class, where there is more than one."""
    names = sorted({served.priority for served in good})
    classes = {name: [served for served in good if served.priority == name] for name in names}
    if len(classes) < 2:
        return {}
    return {name: {"completed": len(of), **_latencies(of)} for name, of in classes.items()}


def _instances(samples: Sequence[Sample], duration: float) -> Result:
    """Those that are there are paid for, whether they are starting, running or draining."""
    mean = _mean_over_time(samples, duration, lambda sample: len(sample.loads))
    return {"mean_instances": mean, "instance_seconds": mean * duration}


def _mean_fragmentation(samples: Sequence[Sample], duration: float) -> float:
    return _mean_over_time(samples, duration, lambda sample: fragmentation(sample.loads))


def _mean_over_time(
    samples: Sequence[Sample], duration: float, of: Callable[[Sample], float]
) -> float:
    """Each sample counts until the next one, the last one until the end of the run."""
    times = [*(sample.at for sample in samples), duration]
    held = [max(0.0, end - at) for at, end in pairwise(times)]
    return statistics.fmean(map(of, samples), held) if sum(held) else 0.0


def _timeline(samples: Sequence[Sample]) -> Result:
    """`used` is a share of the instance's blocks; null where an instance is not there."""
    kept = samples[:: max(1, math.ceil(len(samples) / POINTS))]
    loads = [{load.replica_id: load for load in sample.loads} for sample in kept]
    names = list(dict.fromkeys(name for present in loads for name in present))

    def series(of: Callable[[InstanceLoad], float]) -> dict[str, list[float | None]]:
        return {name: [of(at[name]) if name in at else None for at in loads] for name in names}

    return {
        "seconds": [round(sample.at, 3) for sample in kept],
        "used": series(lambda load: round(load.blocks_used / max(1, load.blocks_total), 4)),
        "waiting": series(lambda load: load.waiting),
        "running": series(lambda load: load.running),
        "fragmentation": [round(fragmentation(sample.loads), 4) for sample in kept],
    }
