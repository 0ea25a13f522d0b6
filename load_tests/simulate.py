"""A scenario in the simulator: each policy at each rate, several at a time."""

import multiprocessing
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from load_tests.metrics import percentile
from load_tests.outcome import Run
from load_tests.scenario import Scenario

_ended: Any = None
"""In a worker process: the requests that have ended, counted over all of them."""


def run(scenario: Scenario, policy: str, rate: float) -> Run:
    """One run, in this process."""
    # Only here: it imports vLLM, which takes ten seconds.
    from load_tests.simulator.fleet import Simulation

    simulation = Simulation(scenario.fleet_config(policy), scenario.seed)
    began = time.perf_counter()
    duration = simulation.run(scenario.trace_at(rate), _count)
    decisions = simulation.decision_s
    return Run(
        scenario=scenario.name,
        policy=policy,
        rate=rate,
        backend="simulator",
        instances=scenario.instances,
        model_id="emulated",
        duration=duration,
        served=simulation.served,
        samples=simulation.samples,
        moves=simulation.moves,
        facts={
            "real_seconds": time.perf_counter() - began,
            "decision_mean_us": 1e6 * statistics.fmean(decisions),
            "decision_p50_us": 1e6 * percentile(decisions, 50),
            "decision_p99_us": 1e6 * percentile(decisions, 99),
            "report_p50_us": 1e6 * percentile(simulation.report_s, 50),
            "report_p99_us": 1e6 * percentile(simulation.report_s, 99),
        },
    )


def run_all(
    scenario: Scenario, cells: Sequence[tuple[str, float]], jobs: int, ended: Any
) -> Iterator[Run]:
    """All (policy, rate) cells, `jobs` at a time, as they end. `ended` counts requests.

    Whatever ends this early, an interrupt or a run that failed, ends the runs under way.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _init, (ended,)) as pool:
        runs = [pool.submit(run, scenario, policy, rate) for policy, rate in cells]
        try:
            for done in as_completed(runs):
                yield done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def _init(ended: Any) -> None:
    global _ended
    _ended = ended


def _count() -> None:
    if _ended is not None:
        with _ended.get_lock():
            _ended.value += 1
