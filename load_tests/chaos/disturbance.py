"""The main part of a scenario: users, faults and a watch, until enough has happened."""

import asyncio
import time
from collections.abc import Sequence

from load_tests.chaos.crowd import Crowd
from load_tests.chaos.fleet import Fleet
from load_tests.chaos.injector import Injector
from load_tests.chaos.processes import Processes
from load_tests.chaos.scenarios import Scenario
from load_tests.chaos.streams import Stream
from load_tests.chaos.watch import Watch

AFTER_S = 10.0
"""It goes on for so long after the last fault: new streams must come through."""

LIMIT_S = 2400.0
"""Beside the scenario's minutes: what has not happened by then will not."""


class Disturbance:
    """`expected`: what each request of the pool says undisturbed."""

    def __init__(
        self,
        fleet: Fleet,
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
        self._beside: list[asyncio.Task[None]] = []

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self.began

    async def run(self) -> None:
        """To the end of the last stream. Raises ServerFailed where a process does not come back."""
        print(f"==> {self._scenario.about}", flush=True)
        self.began = time.perf_counter()
        faults, moves, watch = self._beside = [
            asyncio.create_task(self.injector.run()),
            asyncio.create_task(self.injector.keep_moving()),
            asyncio.create_task(self.watch.run(self._progress)),
        ]
        try:
            await self.crowd.keep_asking(self._scenario.users, self._goes_on)
            await _stop(faults, moves)
            await self.crowd.rest()
        finally:
            await _stop(faults, moves, watch)
        print(self._progress(), flush=True)

    def _goes_on(self) -> bool:
        seconds, least_s = self.seconds, 60 * self._scenario.minutes
        if any(task.done() for task in self._beside) or seconds > LIMIT_S + least_s:
            return False
        events = self.injector.events
        quiet_s = time.perf_counter() - events[-1].at if events else 0.0
        return (
            self.crowd.ended < self._scenario.streams
            or self.injector.kills < self._scenario.kills
            or seconds < least_s
            or quiet_s < AFTER_S
        )

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
