"""Users who ask for copies of a pool's requests, one after the other."""

import asyncio
import random
from collections.abc import Callable, Sequence

import aiohttp

from load_tests.chaos import workload
from load_tests.chaos.streams import Stream
from load_tests.client import Completion


class Crowd:
    """`name`: how their streams' names begin. `streams` has all, `open` those that run."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        pool: Sequence[Completion],
        name: str,
        seed: int,
    ) -> None:
        self.streams: list[Stream] = []
        self.open: set[Stream] = set()
        self._session = session
        self._url = url
        self._pool = pool
        self._name = name
        self._rng = random.Random(f"{name}/{seed}")
        self._beside: set[asyncio.Task[None]] = set()

    @property
    def ended(self) -> int:
        """How many have come to an end, good or bad."""
        return len(self.streams) - len(self.open)

    async def each_once(self, at_once: int) -> list[Stream]:
        """Every request of the pool once, in its order."""
        numbers = iter(range(len(self._pool)))
        await self._users(at_once, lambda: next(numbers, None))
        return sorted(self.streams, key=lambda stream: stream.number)

    async def keep_asking(self, users: int, goes_on: Callable[[], bool]) -> None:
        """Random ones, by so many users, each until it has an end and no longer goes on."""
        await self._users(users, lambda: self._any() if goes_on() else None)

    def burst(self, count: int) -> None:
        """So many at once, beside those of the users."""
        self._beside |= {asyncio.create_task(self._ask(self._any())) for _ in range(count)}

    async def rest(self) -> None:
        """Wait for those of bursts."""
        await asyncio.gather(*self._beside)

    def _any(self) -> int:
        return self._rng.randrange(len(self._pool))

    async def _users(self, count: int, choose: Callable[[], int | None]) -> None:
        async def user() -> None:
            while (number := choose()) is not None:
                await self._ask(number)

        async with asyncio.TaskGroup() as users:
            for _ in range(count):
                users.create_task(user())

    async def _ask(self, number: int) -> None:
        request = self._pool[number]
        name = f"{self._name}-{len(self.streams)}"
        stream = Stream(name, number, workload.length(request))
        self.streams.append(stream)
        self.open.add(stream)
        await stream.run(self._session, self._url, request)
        self.open.discard(stream)
