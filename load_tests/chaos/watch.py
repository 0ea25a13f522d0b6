"""What is seen of a fleet while things happen to it."""

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from load_tests.chaos.crowd import Crowd
from load_tests.chaos.growth import Sample
from load_tests.chaos.processes import Processes
from load_tests.fleet_api import FleetApi, held, states, without
from load_tests.servers import ServerFailed

LOOK_S, USAGE_S, PROGRESS_S = 0.25, 10.0, 10.0
HISTORY_S = 60.0
"""The fleet shows the last 1,000 requests that ended: enough for 16 requests/s."""


@dataclass(frozen=True, slots=True)
class Look:
    """At one moment (seconds of time.perf_counter): streams that are open at the clients, requests
    that instances say they hold, and instances that run. Those that are down do not count.
    """

    at: float
    open: int
    held: int
    running: int


class Watch:
    """`looks` and `usage`: what was seen so far. `down`: instances that do not count."""

    def __init__(
        self, fleet: FleetApi, processes: Processes, crowd: Crowd, down: Collection[str]
    ) -> None:
        self.looks: list[Look] = []
        self.usage: list[Sample] = []
        self._fleet = fleet
        self._processes = processes
        self._crowd = crowd
        self._down = down
        self._told: dict[str, dict[str, Any]] = {}
        self._began = 0.0

    async def run(self, progress: Callable[[], str]) -> None:
        """Watch, and print a line now and then, for ever."""
        self._began = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._look())
            tasks.create_task(self._measure())
            tasks.create_task(self._remember())
            tasks.create_task(self._say(progress))

    async def told_of_all(self) -> dict[str, dict[str, Any]]:
        """What the admin API says of each stream, or said before it forgot; by their names."""
        await self._collect()
        names = {stream.name for stream in self._crowd.streams}
        return {name: told for name, told in self._told.items() if name in names}

    async def _collect(self) -> None:
        with suppress(ServerFailed):  # what was told before is worth keeping
            self._told.update({each["request_id"]: each for each in await self._fleet.requests()})

    async def _look(self) -> None:
        while True:
            were_open = len(self._crowd.open)
            overview = await self._fleet.overview()
            up = without(overview, self._down)
            most_open = max(were_open, len(self._crowd.open))
            running = states(up).count("running")
            self.looks.append(Look(time.perf_counter(), most_open, held(up), running))
            await asyncio.sleep(LOOK_S)

    async def _measure(self) -> None:
        while True:
            usage = await asyncio.to_thread(self._processes.usage)
            self.usage.append((time.perf_counter() - self._began, usage))
            await asyncio.sleep(USAGE_S)

    async def _remember(self) -> None:
        while True:
            await asyncio.sleep(HISTORY_S)
            await self._collect()

    async def _say(self, progress: Callable[[], str]) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            print(progress(), flush=True)


def longest_excess_s(looks: Sequence[Look]) -> float:
    """The longest time that instances held more requests than there were streams, in seconds."""
    longest, since = 0.0, None
    for look in looks:
        if since is not None:
            longest = max(longest, look.at - since)
        if look.held <= look.open:
            since = None
        elif since is None:
            since = look.at
    return longest
