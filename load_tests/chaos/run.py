"""One scenario on a running fleet, from its undisturbed requests to the check for leaks."""

import statistics
from collections.abc import Sequence

import aiohttp

from load_tests.chaos import workload
from load_tests.chaos.crowd import Crowd
from load_tests.chaos.disturbance import Disturbance
from load_tests.chaos.outcome import Outcome
from load_tests.chaos.pauses import Prefills
from load_tests.chaos.processes import Processes
from load_tests.chaos.scenarios import Scenario
from load_tests.chaos.streams import Stream
from load_tests.client import Completion
from load_tests.fleet_api import FleetApi
from load_tests.servers import Server, ServerFailed

UP_S, SETTLE_S = 300.0, 60.0

PROBES = 3
"""Of each length, one after the other; the median counts."""

AT_ONCE = 8
"""Of the undisturbed requests."""


async def play(server: Server, scenario: Scenario, seed: int) -> Outcome:
    """All of it. Raises ServerFailed where the fleet does not do what it must undisturbed, or does
    not come back.
    """
    async with connect() as session:
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
        self._fleet = FleetApi(session, server.url)
        self._processes = Processes(server.pid)

    async def play(self) -> Outcome:
        await self._fleet.until_running(self._scenario.instances, UP_S)
        prefills = await self._probe()
        expected = await self._undisturbed()
        calm = await self._calm() if self._scenario.calm else []
        disturbance = Disturbance(
            self._fleet,
            self._processes,
            self._crowd(self._pool, "chaos"),
            self._scenario,
            self._seed,
            expected,
        )
        await disturbance.run()
        seconds = disturbance.seconds
        leaks = await self._fleet.leaks(self._scenario.instances, SETTLE_S)
        return Outcome(
            scenario=self._scenario,
            seed=self._seed,
            began=disturbance.began,
            seconds=seconds,
            expected=expected,
            calm=calm,
            streams=disturbance.crowd.streams,
            events=disturbance.injector.events,
            looks=disturbance.watch.looks,
            usage=disturbance.watch.usage,
            told=await disturbance.watch.told_of_all(),
            prefills=prefills,
            leaks=leaks,
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
        print(f"==> {self._scenario.streams} streams without faults", flush=True)
        crowd = self._crowd(self._pool, "calm")
        most = self._scenario.streams
        await crowd.keep_asking(self._scenario.users, lambda: len(crowd.streams) < most)
        return crowd.streams

    def _crowd(self, requests: Sequence[Completion], name: str) -> Crowd:
        return Crowd(self._session, self._url, requests, name, self._seed)


def connect() -> aiohttp.ClientSession:
    """A connection for each request: one that is kept may be closed by the other side just when
    it is used again, which would look like a failure.
    """
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))


def _require(streams: Sequence[Stream]) -> None:
    if errors := [stream.error for stream in streams if stream.error]:
        raise ServerFailed(f"undisturbed, {len(errors)} requests failed: {errors[0]}")
