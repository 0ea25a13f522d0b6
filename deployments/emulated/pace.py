"""The emulated accelerator's clock: makes a step last as long as the profile says."""

import time
from collections.abc import Callable
from typing import Protocol

CATCH_UP_S = 0.1
"""How far behind its own clock an accelerator may be and still make up for it."""


class Pace(Protocol):
    """Told of each step: how long it takes, and whether it follows the last one at once."""

    def step(self, seconds: float, follows: bool) -> None: ...


class WallPace:
    """Sleeps. What the scheduler computed between two steps is no part of their time.

    A step that follows another begins, for the accelerator, when that one ended; if the machine was
    too busy to be in time, the next ones make up for it. What cannot be made up for is `lost`.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._ends = 0.0
        self.busy = 0.0
        """Seconds of all steps so far, as the profile has them."""
        self.lost = 0.0
        """Seconds that the steps took longer than that."""

    def step(self, seconds: float, follows: bool) -> None:
        begins = self._ends if follows else self._clock()
        self._ends = begins + seconds
        self.busy += seconds
        early = self._ends - self._clock()
        if early > 0:
            self._sleep(early)
        elif -early > CATCH_UP_S:
            self.lost -= early
            self._ends -= early

    @property
    def drift(self) -> float:
        """Share by which this accelerator is slower than its profile."""
        return self.lost / self.busy if self.busy else 0.0
