"""`python -m load_tests.migration`: what a move costs its request, and the others beside it.

Moves streams of several context lengths in three ways: live pre-copy, one blocking copy, and
recompute at the destination. The client sees the gap between two tokens; the record of the move
says the downtime. Then one request moves back and forth all the time beside eight others. All of
it at two paces: the tiny model's own, and that of LLaMA-7B on an A10 (load_tests.paced).
Writes migration.json, .md and .svg into the results folder.
"""

import argparse
import asyncio
import itertools
import random
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
import yaml

from load_tests import migration_report
from load_tests.client import Completion, Events, connect
from load_tests.migration_report import AFTER, BEFORE, Cell, Move, Slowdown, Window
from load_tests.prompts import random_prompt
from load_tests.servers import PROJECT, Server, ServerFailed, fleet, heed_signals

MAX_STAGES = {"live": 8, "blocking": 1, "recompute": 0}
"""`migration.max_stages` of each way to move."""

IMPORT_PATHS = {"tiny": "app.main:build_app", "a10": "load_tests.paced:build_app"}
"""The application of each pace."""

MODEL, MAX_MODEL_LEN = "tiny-llama", 8192
ENGINE = {
    "kv_cache_memory_bytes": 192 << 20,  # 1,536 blocks
    "max_model_len": MAX_MODEL_LEN,
    "max_num_batched_tokens": MAX_MODEL_LEN,  # recompute is one step, whatever the context
    "enable_prefix_caching": False,  # a request that comes back must bring all of its blocks
}

ROOM_TOKENS = 292
"""Kept for the output, which must outlast the longest move: 45 steps for 8k tokens at pace a10."""

BESIDE = [64] * 8 + [2048]  # contexts of a round's streams; the last one moves
ROUNDS, WINDOW_S = 4, 2.0
ORDER = (False, True, True, False)
"""A round's windows, True with moves. Contexts grow and slow the steps: so, of both kinds alike."""

PAUSE_S, DEADLINE_S = 0.03, 120.0


class Api:
    """A client of one fleet. It makes another prompt for each stream."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session, self.url = session, url
        self._rng = random.Random(0)
        self._names = itertools.count()

    async def get(self, path: str) -> Any:
        """JSON of a GET."""
        return await (await self.session.get(self.url + path)).json()

    async def migrate(self, request_id: str, to: str | None = None) -> Any:
        """The record of a move. Raises ServerFailed where it was not made."""
        body = {"request_id": request_id, "destination": to}
        async with self.session.post(f"{self.url}/fleet/migrate", json=body) as response:
            if response.status == 200:
                return await response.json()
            raise ServerFailed(f"{request_id} was not moved: {await response.text()}")

    async def until_idle(self) -> list[str]:
        """Wait until both instances are up and no request is left. Answers their ids."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                replicas = (await self.get("/fleet"))["replicas"]
                busy = any(r["running"] or r["waiting"] or r["blocks_used"] for r in replicas)
                if [r["state"] for r in replicas] == ["running"] * 2 and not busy:
                    return [r["replica_id"] for r in replicas]
                await asyncio.sleep(PAUSE_S)

    def stream(self, context: int) -> "Stream":
        """With a prompt as long as the context, or a bit shorter where the output needs room."""
        tokens = min(context, MAX_MODEL_LEN - ROOM_TOKENS)
        prompt = random_prompt(self._rng, tokens, tokens)
        headers = {"x-request-id": f"stream-{next(self._names)}"}
        return Stream(self, Completion(MODEL, prompt, MAX_MODEL_LEN - tokens, headers))


class Stream:
    """A completion to watch while it runs. Leaving the context hangs up, and the fleet drops it."""

    def __init__(self, api: Api, request: Completion) -> None:
        self.id = request.headers["x-request-id"]
        self.arrivals: list[float] = []  # seconds of time.perf_counter, as in client.Record
        self._api, self._request = api, request
        self._news = asyncio.Event()

    async def __aenter__(self) -> "Stream":
        self._task = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def until(self, tokens: int) -> None:
        """Wait for this many. Raises ServerFailed where the stream ends before."""
        async with asyncio.timeout(DEADLINE_S):
            while len(self.arrivals) < tokens:
                if self._task.done():
                    said = self._task.exception() or "the end"
                    raise ServerFailed(f"{self.id}: {len(self.arrivals)} tokens, then {said!r}")
                await self._news.wait()
                self._news.clear()

    async def _read(self) -> None:
        events, body, headers = Events(), self._request.body(), self._request.headers
        url = f"{self._api.url}/v1/completions"
        try:
            async with self._api.session.post(url, json=body, headers=headers) as response:
                response.raise_for_status()
                async for data in response.content.iter_any():
                    self.arrivals += [time.perf_counter()] * events.feed(data)
                    self._news.set()
        finally:
            self._news.set()


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
    """Two instances that move requests in this way, and only when told to."""
    print(f"==> starting a fleet: pace {pace}, {way}", flush=True)
    content = yaml.safe_load((PROJECT / "serve_configs/llama.yaml").read_text())
    application = content["applications"][0]
    application["import_path"] = IMPORT_PATHS[pace]
    application["args"]["model"]["engine_kwargs"] |= ENGINE
    settings = {"enabled": False, "max_stages": MAX_STAGES[way]}
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        Path(file.name).write_text(yaml.safe_dump(content))
        log = logs / f"fleet-{pace}-{way}.log"
        with fleet(Path(file.name), {"migration": settings}, {}, log) as server:
            yield server


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
            if (await api.get(f"/fleet/requests/{stream.id}"))["replicas"][-1] != wanted:
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
    parser.add_argument("--paces", nargs="+", choices=IMPORT_PATHS, default=list(IMPORT_PATHS))
    parser.add_argument("--out", type=Path, default=PROJECT / "results/migration")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
