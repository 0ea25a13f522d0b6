"""`python -m load_tests.gpu_check`: does all that is tested on CPUs hold between GPUs?

Runs the tests of the migration, then moves streams over NCCL between instances and compares them
with the same ones unmoved. Twice: with vLLM's batch invariance, without which the batch around a
request may turn a near-tie, so there they must be identical; and as served, for the times alone.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import torch
import uvloop

from load_tests.client import Completion, connect
from load_tests.fleet_api import FleetApi, NotMoved
from load_tests.metrics import percentile
from load_tests.prompts import random_prompt
from load_tests.servers import PROJECT, ServerFailed, fleet, heed_signals

PHASES = {"batch invariant": "1", "as served": "0"}
"""VLLM_BATCH_INVARIANT of each. It pins NCCL to one channel as well, hence its own GB/s."""

NAME, MAX_MODEL_LEN, OUTPUT_TOKENS = "gpu-check", 4096, (150, 400)
AT_ONCE, WARM_UPS, PAUSE_S = 8, 4, 0.02
UP_S, DEADLINE_S = 300.0, 600.0

HEADING = (
    "| fleet | moved | identical | stages | GB/s | downtime p50, ms | p99, ms | step, ms |\n"
    "| :-- | --: | --: | --: | --: | --: | --: | --: |"
)
NOTE = "GB/s over the whole call that moved a stream; step: between two tokens of unmoved streams."


@dataclass(slots=True)
class Run:
    """One stream. Times are seconds of time.perf_counter; a move is its record and its call's."""

    token_ids: list[int] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    moves: list[tuple[Mapping[str, Any], float]] = field(default_factory=list)


@dataclass(slots=True)
class Result:
    """The streams of one fleet, unmoved and moved, in the same order."""

    name: str
    unmoved: Sequence[Run]
    moved: Sequence[Run]

    @property
    def identical(self) -> int:
        """Moved streams with the tokens of the unmoved ones."""
        pairs = zip(self.unmoved, self.moved, strict=True)
        return sum(bool(b.moves) and a.token_ids == b.token_ids for a, b in pairs)

    @property
    def flaws(self) -> list[str]:
        """What must not be; near-ties only where batches are invariant."""
        count, moved = len(self.moved), sum(bool(run.moves) for run in self.moved)
        differ = moved - self.identical if self.name == "batch invariant" else 0
        found = {"streams were not moved": count - moved, "moved streams differ": differ}
        return [f"{self.name}: {many} {what}" for what, many in found.items() if many]

    def row(self) -> str:
        """The table's."""
        moves = [move for run in self.moved for move in run.moves]
        steps = [b - a for run in self.unmoved for a, b in pairwise(run.arrivals)]
        downtimes = [record["downtime_ms"] for record, _ in moves]
        stages = percentile([record["stages"] for record, _ in moves], 50)
        speed = sum(record["bytes"] for record, _ in moves) / 1e9
        speed /= sum(took for _, took in moves) or 1
        return (
            f"| {self.name} | {sum(bool(run.moves) for run in self.moved)}/{len(self.moved)}"
            f" | {self.identical} | {stages:.0f} | {speed:.2f} | {percentile(downtimes, 50):.1f}"
            f" | {percentile(downtimes, 99):.1f} | {1e3 * percentile(steps, 50):.1f} |"
        )


def main() -> int:
    options = _options()
    wanted = max(2, options.replicas * options.tensor_parallel_size)
    if (there := torch.cuda.device_count()) < wanted:
        print(f"needs {wanted} GPUs on this machine, {there} are there", file=sys.stderr)
        return 2
    heed_signals()
    try:
        with tempfile.NamedTemporaryFile() as stamp:
            # `make serve`, here and in the tests, would install its own Python, which is for CPUs.
            os.environ["MAKEFLAGS"] = f"INSTALLED={stamp.name} BIN={Path(sys.executable).parent}"
            failed = 0 if options.skip_tests else run_tests()
            results = [measure(options, phase) for phase in PHASES]
    except (ServerFailed, aiohttp.ClientError, TimeoutError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    flaws = [flaw for result in results for flaw in result.flaws]
    flaws += [f"the tests failed: pytest ended with {failed}"] * bool(failed)
    print(HEADING, *(result.row() for result in results), "", NOTE, sep="\n")
    print("\n".join(flaws) or "all is well")
    return int(bool(flaws))


def run_tests() -> int:
    """pytest's exit code. vLLM takes the GPU by itself; two engines of one process share it."""
    print("==> running the tests of the migration", flush=True)
    # The tests look into the V1 runner, and compare with plain vLLM.
    env = {**os.environ, "VLLM_BATCH_INVARIANT": "1", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "tests/migration", "tests/e2e"]
    return subprocess.call(command, cwd=PROJECT, env=env)


def measure(options: argparse.Namespace, phase: str) -> Result:
    """The same streams unmoved and moved, on a fleet of their own."""
    print(f"==> starting {options.replicas} instances, {phase}", flush=True)
    os.environ["VLLM_BATCH_INVARIANT"] = PHASES[phase]
    log = PROJECT / f"results/gpu-check-{phase.replace(' ', '-')}.log"
    with fleet(PROJECT / "serve_configs/llama.yaml", overrides(options), {}, log) as server:
        todo = requests(options.streams)
        return uvloop.run(compare(phase, server.url, todo, options.replicas))


def overrides(options: argparse.Namespace) -> dict[str, Any]:
    """Of the YAML file's `args`: nothing moves but when told to."""
    engine = {
        "max_model_len": MAX_MODEL_LEN,
        "tensor_parallel_size": options.tensor_parallel_size,
        "enable_prefix_caching": False,  # all blocks must travel
    }
    return {
        "model": {"model_id": NAME, "model_source": options.model, "engine_kwargs": engine},
        "replicas": options.replicas,
        "migration": {"enabled": False, "backend": "nccl"},
    }


def requests(count: int) -> list[Completion]:
    """Greedy and seeded ones in turn; the same ones at every call."""
    rng = random.Random(20261121)
    return [
        Completion(
            NAME,
            random_prompt(rng, 10, 2000),
            rng.randint(*OUTPUT_TOKENS),
            extra={"return_token_ids": True, "seed": number, "temperature": number % 2},
        )
        for number in range(count)
    ]


async def compare(name: str, url: str, todo: Sequence[Completion], replicas: int) -> Result:
    """Run all of them, moved ones too. The first moves connect instances: they are not counted."""
    async with connect() as session, asyncio.timeout(DEADLINE_S):
        api = FleetApi(session, url)
        await api.until_running(replicas, UP_S)
        await _run_all(api, [*todo[:WARM_UPS]] * replicas, "warm-up", moving=True)
        unmoved = await _run_all(api, todo, "unmoved", moving=False)
        moved = await _run_all(api, todo, "moved", moving=True)
    return Result(name, unmoved, moved)


async def _run_all(api: FleetApi, todo: Iterable[Completion], name: str, moving: bool) -> list[Run]:
    slots, rng = asyncio.Semaphore(AT_ONCE), random.Random(7)

    async def one(number: int, request: Completion, at: int | None) -> Run:
        async with slots:
            return await stream(api, request, f"{name}-{number}", at)

    # In the first half of the output: no stream ends before it was moved.
    points = ((r, rng.randint(1, r.output_tokens // 2) if moving else None) for r in todo)
    return await asyncio.gather(*(one(i, request, at) for i, (request, at) in enumerate(points)))


async def stream(api: FleetApi, request: Completion, name: str, at: int | None) -> Run:
    """Read one to its end; after `at` tokens it is moved."""
    run, moving = Run(), None
    body, own, url = request.body(), {"x-request-id": name}, f"{api.url}/v1/completions"
    async with api.session.post(url, json=body, headers=own) as response:
        response.raise_for_status()
        async for line in response.content:
            if tokens := tokens_of(line):
                run.token_ids += tokens
                run.arrivals.append(time.perf_counter())
            if at is not None and moving is None and len(run.token_ids) >= at:
                moving = asyncio.create_task(_move(api, name, run))
    if moving is not None:
        await moving
    return run


def tokens_of(line: bytes) -> list[int]:
    """The token ids in a line of an SSE stream. Raises ServerFailed for an error in it."""
    if not line.startswith(b"data: {"):
        return []
    payload = json.loads(line.removeprefix(b"data: "))
    if "error" in payload:
        raise ServerFailed(str(payload["error"]))
    return [token for choice in payload["choices"] for token in choice.get("token_ids") or []]


async def _move(api: FleetApi, name: str, run: Run) -> None:
    """Ask until it is done or the stream has ended: a destination may be busy for a moment."""
    while True:
        asked = time.perf_counter()
        try:
            record = await api.migrate(name)
        except NotMoved as error:
            if "has ended" in str(error):
                return
            await asyncio.sleep(PAUSE_S)
        else:
            run.moves.append((record, time.perf_counter() - asked))
            return


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m load_tests.gpu_check", description=__doc__)
    parser.add_argument("--model", default="models/tiny-llama", help="a folder or a hub id")
    for name, default in {"tensor-parallel-size": 1, "replicas": 2, "streams": 40}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--skip-tests", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
