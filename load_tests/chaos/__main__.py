"""`python -m load_tests.chaos SCENARIO...`: load with known outputs while processes are killed.

Each scenario (scenarios.py) starts a fleet and runs a pool of requests undisturbed; then copies of
them, while faults come as drawn from the seed. Writes JSON, tables and a figure for each into the
folder `chaos` of the results. The exit code is 0 where all promises were kept.
"""

import argparse
import sys
from pathlib import Path

import uvloop

from load_tests.chaos import report, run
from load_tests.chaos.scenarios import SCENARIOS, Scenario
from load_tests.servers import PROJECT, ServerFailed, heed_signals, serving


def main() -> int:
    options = _options()
    heed_signals()
    try:
        kept = [
            _run(SCENARIOS[name].scaled(options.streams, options.minutes), options)
            for name in options.scenarios
        ]
    except KeyboardInterrupt:
        return 130
    return 0 if all(kept) else 1


def _run(scenario: Scenario, options: argparse.Namespace) -> bool:
    """Whether all promises were kept."""
    folder = options.out / "chaos"
    print(f"==> {scenario.name}: starting {scenario.instances} instances", flush=True)
    try:
        with serving(scenario.yaml(folder), {}, folder / f"{scenario.name}.log") as server:
            outcome = uvloop.run(run.play(server, scenario, options.seed))
    except ServerFailed as error:
        print(error, file=sys.stderr)
        return False
    print(report.write(outcome, folder))
    return not outcome.broken()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m load_tests.chaos", description=__doc__)
    parser.add_argument(
        "scenarios",
        nargs="+",
        choices=list(SCENARIOS),
        metavar="SCENARIO",
        help="; ".join(f"{one.name}: {one.about}" for one in SCENARIOS.values()),
    )
    parser.add_argument("--seed", type=int, default=0, help="of requests and faults")
    parser.add_argument(
        "--streams", type=int, help="instead of the scenario's; kills in proportion"
    )
    parser.add_argument("--minutes", type=float, help="the least that it lasts")
    parser.add_argument("--out", type=Path, default=PROJECT / "results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
