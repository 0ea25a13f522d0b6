"""`python -m load_tests.migration`: what a move costs its request, and the others beside it.

Moves streams of several context lengths in three ways: live pre-copy, one blocking copy, and
recompute at the destination. The client sees the gap between two tokens; the record of the move
says the downtime. Then one request moves back and forth all the time beside eight others. All of
it at two paces: the tiny model's own, and that of LLaMA-7B on an emulated A10.
Writes migration.json, .md and .svg into the results folder.
"""

import argparse
import asyncio
import itertools
import sys
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import uvloop

from load_tests import migration_report
from load_tests.client import connect
from load_tests.migration_client import MAX_MODEL_LEN, MODEL, PAUSE_S, Api
from load_tests.migration_report import AFTER, BEFORE, Cell, Move, Slowdown, Window
from load_tests.servers import PROJECT, Server, ServerFailed, application, heed_signals, serving

MAX_STAGES = {"live": 8, "blocking": 1, "recompute": 0}
"""`migration.max_stages` of each way to move."""

ENGINE_KWARGS = {
    "max_model_len": MAX_MODEL_LEN,
    "max_num_batched_tokens": MAX_MODEL_LEN,  # recompute is one step, whatever the context
    "enable_prefix_caching": False,  # a request that comes back must bring all of its blocks
}
TINY_KWARGS = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 32,
    "kv_cache_memory_bytes": 192 << 20,  # 1,536 blocks
    "max_num_seqs": 64,
}
PACES: dict[str, tuple[Any, dict[str, Any]]] = {
    "tiny": ("vllm", TINY_KWARGS),
    "a10": ({"emulated": {"profile": "a10-llama-7b"}}, {}),  # which says what it is made of
}
"""`engine` of each pace, and the engine arguments that are its own."""

BESIDE = [64] * 8 + [2048]  # contexts of a round's streams; the last one moves
ROUNDS, WINDOW_S = 4, 2.0
ORDER = (False, True, True, False)
"""A round's windows, True with moves. Contexts grow and slow the steps: so, of both kinds alike."""


def main() -> int:
    options = _options()
    heed_signals()
    cells = [Cell(p, w, c) for p in options.paces for w in MAX_STAGES for c in options.contexts]
    slowdowns = [Slowdown(pace) for pace in options.paces]
    try:
        for pace, way in itertools.product(options.paces, MAX_STAGES):
            mine = [cell for cell in cells if (cell.pace, cell.way) == (pace, way)]
            slowdown = slowdowns[options.paces.index(pace)] if way == "live" else None
            with start(pace, way, options.out) as server:
                uvloop.run(measure(server.url, mine, options.reps, slowdown))
    except ServerFailed as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(migration_report.write(cells, slowdowns, options.out))
    return 0


@contextmanager
def start(pace: str, way: str, logs: Path) -> Iterator[Server]:
    """The fleet of a pace and a way."""
    print(f"==> starting a fleet: pace {pace}, {way}", flush=True)
    log = logs / f"fleet-{pace}-{way}.log"
    with serving(application(fleet_args(pace, way)), {}, log) as server:
        yield server


def fleet_args(pace: str, way: str) -> dict[str, Any]:
    """`args` of two instances that move requests in this way, and only when told to."""
    engine, engine_kwargs = PACES[pace]
    return {
        "model": {
            "model_id": MODEL,
            "model_source": "models/tiny-llama",
            "engine_kwargs": engine_kwargs | ENGINE_KWARGS,
        },
        "engine": engine,
        "replicas": 2,
        "migration": {"enabled": False, "max_stages": MAX_STAGES[way]},
    }


async def measure(url: str, cells: list[Cell], reps: int, slowdown: Slowdown | None) -> None:
    """The moves of these cells, and the slowdown if wanted, on one fleet."""
    async with connect() as session:
        api = Api(session, url)
        await _warm_up(api, max(cell.context for cell in cells))
        for cell in cells:
            for _ in range(reps):
                cell.moves.append(await _move(api, cell.context))
            print(migration_report.progress(cell), flush=True)
        if slowdown:
            for _ in range(ROUNDS):
                await _round(api, slowdown)
            print(migration_report.slowdown_line(slowdown), flush=True)


async def _warm_up(api: Api, context: int) -> None:
    """There and back: the first move in each direction connects the two."""
    await api.until_idle()
    async with api.stream(context) as stream:
        for _ in range(2):
            await stream.until(len(stream.arrivals) + BEFORE)
            await api.migrate(stream.id)


async def _move(api: Api, context: int) -> Move:
    await api.until_idle()
    async with api.stream(context) as stream:
        await stream.until(BEFORE)
        sent = time.perf_counter()
        record = await api.migrate(stream.id)
        answered = time.perf_counter()
        await stream.until(bisect_right(stream.arrivals, answered) + AFTER)
    return Move.of(record, stream.arrivals, sent, answered)


async def _round(api: Api, slowdown: Slowdown) -> None:
    """Eight streams that stay, four on each instance, and one that moves in some windows."""
    replicas = await api.until_idle()
    async with AsyncExitStack() as running:
        streams = [await running.enter_async_context(api.stream(c)) for c in BESIDE]
        for stream in streams:
            await stream.until(BEFORE)
        *others, mover = streams
        for stream, wanted in zip(others, itertools.cycle(replicas), strict=False):
            if await api.place(stream.id) != wanted:
                await api.migrate(stream.id, wanted)
        windows = [await _window(api, mover.id, moving) for moving in ORDER]
        if not all(window.moves for window in windows if window.moving):
            raise ServerFailed(f"{mover.id} could not be moved")
    slowdown.add([stream.arrivals for stream in others], windows)


async def _window(api: Api, request_id: str, moving: bool) -> Window:
    """It ends with its last move's answer, so that none is left for the next window."""
    start, moves = time.perf_counter(), 0
    while (left := start + WINDOW_S - time.perf_counter()) > 0:
        if not moving:
            await asyncio.sleep(left)
            continue
        try:
            await api.migrate(request_id)
            moves += 1
        except ServerFailed:  # an instance refuses what it handed over a step ago
            await asyncio.sleep(PAUSE_S)
    return Window(start, time.perf_counter(), moves, moving)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m load_tests.migration", description=__doc__)
    parser.add_argument("--reps", type=int, default=5, help="moves for each cell")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256 << n for n in range(6)])
    parser.add_argument("--paces", nargs="+", choices=PACES, default=list(PACES))
    parser.add_argument("--out", type=Path, default=PROJECT / "results/migration")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
