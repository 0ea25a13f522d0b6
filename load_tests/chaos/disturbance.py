"""The main part of a scenario: users, faults and a watch, until enough has happened."""

import asyncio
import time
from collections.abc import Sequence

from load_tests.chaos.crowd import Crowd
from load_tests.chaos.injector import Injector
from load_tests.chaos.processes import Processes
from load_tests.chaos.scenarios import Scenario
from load_tests.chaos.streams import Stream
from load_tests.chaos.watch import Watch
from load_tests.fleet_api import FleetApi

AFTER_S = 10.0
"""Users go on for so long after the last fault: new streams must come through."""

PAUSE_S = 0.2

LIMIT_S = 2400.0
"""Beside the scenario's minutes: what has not happened by then will not."""


class Disturbance:
    """`expected`: what each request of the pool says undisturbed."""

    def __init__(
        self,
        fleet: FleetApi,
        processes: Processes,
        crowd: Crowd,
        scenario: Scenario,
        seed: int,
        expected: Sequence[Stream],
    ) -> None:
        self.crowd = crowd
        self.injector = Injector(fleet, processes, crowd, scenario, seed)
        self.watch = Watch(fleet, processes, crowd, self.injector.down)
        self.began = time.perf_counter()
        self._scenario = scenario
        self._expected = expected
        self._over = False

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self.began

    async def run(self) -> None:
        """To the end of the last stream. Raises ServerFailed where a process does not come back."""
        print(f"==> {self._scenario.about}", flush=True)
        self.began = time.perf_counter()
        asking = self.crowd.keep_asking(self._scenario.users, lambda: not self._over)
        users, faults, moves, *_ = tasks = [
            asyncio.create_task(asking),
            asyncio.create_task(self.injector.run()),
            asyncio.create_task(self.injector.keep_moving()),
            asyncio.create_task(self.watch.run(self._progress)),
        ]
        try:
            while not (self._enough() or any(task.done() for task in tasks)):
                await asyncio.sleep(PAUSE_S)
            await _stop(faults, moves)
            await asyncio.sleep(AFTER_S)
            self._over = True
            await users
            await self.crowd.rest()
        finally:
            await _stop(*tasks)
        print(self._progress(), flush=True)

    def _enough(self) -> bool:
        least_s = 60 * self._scenario.minutes
        reached = (
            self.crowd.ended >= self._scenario.streams
            and self.injector.kills >= self._scenario.kills
            and self.seconds >= least_s
        )
        return reached or self.seconds > LIMIT_S + least_s

    def _progress(self) -> str:
        streams = self.crowd.streams
        verdicts = [stream.verdict(self._expected[stream.number]) for stream in streams]
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("open", "right", "failed", "wrong"))
        running = self.watch.looks[-1].running if self.watch.looks else 0
        return (
            f"{self.seconds:5.0f} s: streams {counts}; {running} instances run;"
            f" {len(self.injector.events)} faults, {self.injector.kills} processes killed"
        )


async def _stop(*tasks: asyncio.Task[None]) -> None:
    """Raises what one of them ended with by itself."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.result()
