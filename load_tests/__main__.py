"""`python -m load_tests`: scenarios on the real fleet and in the simulator, and their report.

    python -m load_tests simulate m-m --requests 2000 --rates 12 13
    python -m load_tests bound m-m --rates 12 13
    python -m load_tests run m-m --policies infaas llumnix
    python -m load_tests report

Both write the same results, a JSON file for each policy and rate.
"""

import argparse
import multiprocessing
import os
import sys
import threading
from functools import partial
from pathlib import Path

from tqdm import tqdm

from load_tests import pool, priority_report, report, results, scaling_report, simulate
from load_tests.outcome import Run
from load_tests.scenario import Scenario, ScenarioError, load_scenario
from load_tests.servers import PROJECT, ServerFailed, heed_signals
from load_tests.traces.trace import TraceError

REFRESH_S = 0.5


def main() -> int:
    options = _options()
    heed_signals()
    try:
        options.command(options)
    except (ScenarioError, TraceError, ServerFailed) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _simulate(options: argparse.Namespace) -> None:
    for scenario in _scenarios(options):
        _simulate_one(scenario, options)


def _simulate_one(scenario: Scenario, options: argparse.Namespace) -> None:
    cells = [(policy, rate) for rate in scenario.rates for policy in scenario.policies]
    ended = multiprocessing.get_context("spawn").Value("q", 0)
    with _bar(scenario.name, len(cells) * scenario.requests) as bar:
        stop = threading.Event()
        watching = threading.Thread(target=_follow, args=(bar, ended, stop))
        watching.start()
        try:
            for run in simulate.run_all(scenario, cells, options.jobs, ended):
                _keep(run, options.results, bar)
        finally:
            stop.set()
            watching.join()


def _bound(options: argparse.Namespace) -> None:
    for scenario in _scenarios(options):
        with _bar(scenario.name, scenario.requests * len(scenario.rates)) as bar:
            for rate in scenario.rates:
                _keep(pool.run(scenario, rate, bar.update), options.results, bar)


def _run(options: argparse.Namespace) -> None:
    from load_tests import fleet_run

    for scenario in _scenarios(options):
        for policy in scenario.policies:
            print(f"==> starting {scenario.instances} instances, policy {policy}", flush=True)
            with _bar(scenario.name, scenario.requests * len(scenario.rates)) as bar:
                keep = partial(_keep, folder=options.results, bar=bar)
                fleet_run.run(scenario, policy, options.results / "logs", bar.update, keep)


def _report(options: argparse.Namespace) -> None:
    if not any(options.results.glob("*/*.json")):
        raise ScenarioError(f"{options.results} has no results; `run` and `simulate` write them")
    for kind in (report, priority_report, scaling_report):
        if table := kind.write(options.results):
            print(table, end="\n\n")


def _scenarios(options: argparse.Namespace) -> list[Scenario]:
    """As their files say, but for what the command line says; each with all its variants."""
    changes = {
        key: value
        for key in ("requests", "rates", "policies", "instances", "seed")
        if (value := getattr(options, key, None)) is not None
    }
    scenarios = [load_scenario(name).changed(**changes) for name in options.scenarios]
    variants = [variant for scenario in scenarios for variant in scenario.each()]
    for variant in variants:
        variant.trace_at(variant.rates[0])  # what is wrong is told now, not when its turn comes
        for policy in variant.policies:
            variant.fleet_config(policy)
    return variants


def _keep(run: Run, folder: Path, bar: tqdm) -> None:
    found = results.save(run, folder)
    bar.write(
        f"{run.scenario:>9} {run.backend:>9} {run.policy:>12} {run.rate:>5g}/s:"
        f" TTFT mean {found['mean_ttft_ms'] / 1e3:7.3f} s P99 {found['p99_ttft_ms'] / 1e3:8.3f} s,"
        f" TPOT P99 {found['p99_tpot_ms']:6.1f} ms,"
        f" preempted {found['preemptions']:>4}, moved {found['migrations']['completed']:>5},"
        f" failed {found['failed']}"
    )


def _bar(name: str, requests: int) -> tqdm:
    return tqdm(total=requests, desc=name, unit=" requests", smoothing=0.05, mininterval=REFRESH_S)


def _follow(bar: tqdm, ended: object, stop: threading.Event) -> None:
    while not stop.wait(REFRESH_S):
        bar.n = ended.value  # type: ignore[attr-defined]
        bar.refresh()


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return count


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m load_tests", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--results", type=Path, default=PROJECT / "results")
    scenario = argparse.ArgumentParser(add_help=False, parents=[common])
    scenario.add_argument(
        "scenarios", nargs="+", metavar="scenario", help="a name in load_tests/scenarios, or a file"
    )
    scenario.add_argument("--requests", type=int, help="instead of the scenario's")
    scenario.add_argument("--rates", type=float, nargs="+", help="requests/s")
    scenario.add_argument("--instances", type=int)
    scenario.add_argument("--seed", type=int)

    fleet = argparse.ArgumentParser(add_help=False, parents=[scenario])
    fleet.add_argument("--policies", nargs="+")

    command = commands.add_parser("simulate", parents=[fleet], help="under a virtual clock")
    command.add_argument("--jobs", type=_count, default=os.cpu_count(), help="runs at a time")
    command.set_defaults(command=_simulate)
    command = commands.add_parser(
        "bound", parents=[scenario], help="one pool of memory: what a policy comes close to"
    )
    command.set_defaults(command=_bound)
    command = commands.add_parser("run", parents=[fleet], help="on the real fleet, over HTTP")
    command.set_defaults(command=_run)
    command = commands.add_parser("report", parents=[common], help="tables and figures of all runs")
    command.set_defaults(command=_report)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
