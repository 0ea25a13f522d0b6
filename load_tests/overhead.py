"""`python -m load_tests.overhead`: what the fleet costs, one replica of it beside plain vLLM.

Both serve the same model with the same engine arguments and one thread for it. They take turns:
each round sends the same prompts to one, then to the other, and each number is the median of the
rounds. Writes overhead.json, .md and .svg into the results folder.
"""

import argparse
import os
import random
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import uvloop

from load_tests import overhead_report
from load_tests.client import Completion, closed_loop
from load_tests.cpu import CpuMeter
from load_tests.metrics import Numbers, median_of, summarize
from load_tests.prompts import random_prompt
from load_tests.servers import (
    PROJECT,
    Server,
    ServerFailed,
    fleet,
    heed_signals,
    plain_vllm,
)

REQUESTS_PER_STREAM = {1: 12, 8: 6}
"""Enough for a few seconds each; other concurrencies send four."""

SERVES_OWN_PROXY = {"RAY_ENV": "RAY_SERVE_USE_GRPC_BY_DEFAULT=1 RAY_USAGE_STATS_ENABLED=0"}
"""Instead of HAProxy: the Makefile's variable, without what switches that on."""


@dataclass(slots=True)
class Cell:
    """One server at one concurrency: the numbers of each round, and the CPU of each process."""

    server: str
    concurrency: int
    rounds: list[Numbers] = field(default_factory=list)
    cpu: list[dict[str, float]] = field(default_factory=list)

    def median(self) -> Numbers:
        """Each number's median over the rounds."""
        return median_of(self.rounds)


def main() -> int:
    options = _options()
    heed_signals()
    try:
        with ExitStack() as running:
            cells = uvloop.run(measure(start(options, running), options))
    except ServerFailed as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(overhead_report.write(cells, vars(options), options.results))
    return 0


def start(options: argparse.Namespace, running: ExitStack) -> list[Server]:
    """Plain vLLM, then one replica of the fleet; `running` stops them."""
    variables = SERVES_OWN_PROXY if options.proxy == "serve" else {}
    servers = []
    for name, server in (
        ("vllm", partial(plain_vllm, options.config)),
        ("fleet", partial(fleet, options.config, {"replicas": 1}, variables)),
    ):
        print(f"==> starting {name}", flush=True)
        began = time.monotonic()
        log = options.results / f"overhead-{name}.log"
        servers.append(running.enter_context(server(log=log)))
        print(f"    up after {time.monotonic() - began:.0f} s", flush=True)
    return servers


async def measure(servers: list[Server], options: argparse.Namespace) -> list[Cell]:
    """All rounds. Both servers stay up: the idle one takes a few percent of a core."""
    cells = {(s.name, c): Cell(s.name, c) for c in options.concurrency for s in servers}
    print("==> warming up", flush=True)
    for server in servers:
        for concurrency in options.concurrency:
            await _run(server, concurrency, options, random.Random(-1))
    _print_heading()
    for number in range(options.rounds):
        for concurrency in options.concurrency:
            for server in servers if number % 2 == 0 else reversed(servers):
                seed = f"{options.seed}/{number}/{concurrency}"
                numbers, cpu = await _run(server, concurrency, options, random.Random(seed))
                cell = cells[server.name, concurrency]
                cell.rounds.append(numbers)
                cell.cpu.append(cpu)
                _print_row(number, options.rounds, cell)
    return list(cells.values())


async def _run(
    server: Server, concurrency: int, options: argparse.Namespace, rng: random.Random
) -> tuple[Numbers, dict[str, float]]:
    """One round of one cell: its numbers, and the CPU milliseconds a token of each process."""
    requests = [
        Completion(options.model, random_prompt(rng, *options.prompt_tokens), options.output_tokens)
        for _ in range(concurrency * REQUESTS_PER_STREAM.get(concurrency, 4))
    ]
    meter, began = CpuMeter(server.pid), time.perf_counter()
    own = CpuMeter(os.getpid(), alone=True)
    records = await closed_loop(server.url, requests, concurrency)
    duration = time.perf_counter() - began
    wrong = [r.error or f"{r.output_tokens} tokens" for r in records]
    wrong = [said for said in wrong if said != f"{options.output_tokens} tokens"]
    if wrong:
        raise ServerFailed(f"{server.name}: {len(wrong)} requests went wrong: {wrong[0]}")
    numbers = summarize(records, duration)
    cpu = {share.name: share.percent for share in meter.shares() if share.percent >= 1}
    cpu["client"] = own.shares()[0].percent
    return numbers, cpu


def _print_heading() -> None:
    print(f"{'round':>7} {'streams':>7} {'server':>7} {'tokens/s':>9} {'TTFT p50':>9} {'p95':>7}")


def _print_row(number: int, rounds: int, cell: Cell) -> None:
    numbers = cell.rounds[-1]
    print(
        f"{number + 1:>3}/{rounds:<3} {cell.concurrency:>7} {cell.server:>7}"
        f" {numbers['output_throughput']:>9.0f} {numbers['median_ttft_ms']:>6.1f} ms"
        f" {numbers['p95_ttft_ms']:>4.0f} ms",
        flush=True,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m load_tests.overhead", description=__doc__)
    parser.add_argument("--config", type=Path, default=PROJECT / "serve_configs/llama.yaml")
    parser.add_argument("--model", default="tiny-llama", help="its name in that file")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=[64, 512])
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--proxy", choices=["haproxy", "serve"], default="haproxy")
    parser.add_argument("--results", type=Path, default=PROJECT / "results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
