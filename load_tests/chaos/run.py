"""One scenario on a running fleet, from its undisturbed requests to the check for leaks."""

import asyncio
import statistics
import time
from collections.abc import Sequence

import aiohttp

from load_tests.chaos import workload
from load_tests.chaos.crowd import Crowd
from load_tests.chaos.fleet import Fleet
from load_tests.chaos.injector import Injector
from load_tests.chaos.outcome import Outcome
from load_tests.chaos.pauses import Prefills
from load_tests.chaos.processes import Processes
from load_tests.chaos.scenarios import Scenario
from load_tests.chaos.streams import Stream
from load_tests.chaos.watch import Watch
from load_tests.client import Completion
from load_tests.servers import Server, ServerFailed

UP_S, SETTLE_S = 300.0, 60.0
PROBES = 3
"""Of each length, one after the other; the median counts."""

AT_ONCE = 8
"""Of the undisturbed requests."""

LIMIT_S = 2400.0
"""Beside the scenario's minutes: what has not been reached by then will not be."""


async def play(server: Server, scenario: Scenario, seed: int) -> Outcome:
    """All of it. Raises ServerFailed where the fleet does not do what it must undisturbed, or does
    not come back.
    """
    async with _session() as session:
        return await _Play(session, server, scenario, seed).play()


class _Play:
    def __init__(
        self, session: aiohttp.ClientSession, server: Server, scenario: Scenario, seed: int
    ) -> None:
        self._session = session
        self._url = server.url
        self._scenario = scenario
        self._seed = seed
        self._pool = workload.pool(scenario.workload, seed)
        self._fleet = Fleet(session, server.url)
        self._processes = Processes(server.pid)

    async def play(self) -> Outcome:
        await self._fleet.until_running(self._scenario.instances, UP_S)
        prefills = await self._probe()
        expected = await self._undisturbed()
        calm = await self._calm() if self._scenario.calm else []
        crowd, injector, watch = self._cast()
        print(f"==> {self._scenario.about}", flush=True)
        began = time.perf_counter()
        await self._disturbed(crowd, injector, watch, expected)
        seconds = time.perf_counter() - began
        leaks = await self._fleet.leaks(self._scenario.instances, SETTLE_S)
        await watch.collect()
        return Outcome(
            self._scenario,
            self._seed,
            began,
            seconds,
            expected,
            calm,
            crowd.streams,
            injector.events,
            watch.looks,
            watch.usage,
            {
                stream.name: watch.told[stream.name]
                for stream in crowd.streams
                if stream.name in watch.told
            },
            prefills,
            leaks,
        )

    async def _probe(self) -> Prefills:
        """Time prefills on the idle fleet."""
        print("==> timing prefills", flush=True)
        seconds = []
        for tokens in workload.PROBED:
            requests = [workload.probe(tokens, number) for number in range(PROBES)]
            probes = await self._crowd(requests, f"probe-{tokens}").each_once(1)
            _require(probes)
            seconds.append(statistics.median(probe.ttft for probe in probes))
        return Prefills(workload.PROBED, seconds)

    async def _undisturbed(self) -> list[Stream]:
        print(f"==> {len(self._pool)} requests, undisturbed", flush=True)
        expected = await self._crowd(self._pool, "undisturbed").each_once(AT_ONCE)
        _require(expected)
        return expected

    async def _calm(self) -> list[Stream]:
        """As many streams as later, of as many users."""
        print(f"==> {self._scenario.streams} streams, no faults", flush=True)
        crowd = self._crowd(self._pool, "calm")
        await crowd.keep_asking(
            self._scenario.users, lambda: len(crowd.streams) < self._scenario.streams
        )
        return crowd.streams

    def _cast(self) -> tuple[Crowd, Injector, Watch]:
        crowd = self._crowd(self._pool, "chaos")
        injector = Injector(self._fleet, self._processes, crowd, self._scenario, self._seed)
        return crowd, injector, Watch(self._fleet, self._processes, crowd, injector.down)

    async def _disturbed(
        self, crowd: Crowd, injector: Injector, watch: Watch, expected: Sequence[Stream]
    ) -> None:
        began = time.perf_counter()

        def goes_on() -> bool:
            seconds = time.perf_counter() - began
            if any(task.done() for task in beside) or seconds > LIMIT_S + self._minutes_s:
                return False
            few = crowd.ended < self._scenario.streams or injector.kills < self._scenario.kills
            return few or seconds < self._minutes_s

        def progress() -> str:
            verdicts = [one.verdict(expected[one.number]) for one in crowd.streams]
            counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("right", "failed", "wrong"))
            return (
                f"{time.perf_counter() - began:5.0f} s: {len(crowd.open)} streams open, {counts};"
                f" {watch.looks[-1].running} instances run; {len(injector.events)} faults,"
                f" {injector.kills} processes killed"
            )

        beside = [
            asyncio.create_task(injector.run()),
            asyncio.create_task(injector.keep_moving()),
            asyncio.create_task(watch.run(progress)),
        ]
        try:
            await crowd.keep_asking(self._scenario.users, goes_on)
            await _stop(beside[:2])
            await crowd.rest()
        finally:
            await _stop(beside)
        print(progress(), flush=True)

    @property
    def _minutes_s(self) -> float:
        return 60 * self._scenario.minutes

    def _crowd(self, requests: Sequence[Completion], name: str) -> Crowd:
        return Crowd(self._session, self._url, requests, name, self._seed)


def _session() -> aiohttp.ClientSession:
    """A connection for each request: one that is kept may be closed by the other side just when
    it is used again, which would look like a failure.
    """
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))


async def _stop(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Raises what one of them ended with by itself."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.result()


def _require(streams: Sequence[Stream]) -> None:
    if errors := [stream.error for stream in streams if stream.error]:
        raise ServerFailed(f"undisturbed, {len(errors)} requests failed: {errors[0]}")
