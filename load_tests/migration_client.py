"""The client of load_tests.migration: the admin API, and streams that are watched as they run."""

import asyncio
import itertools
import random
import time

import aiohttp

from load_tests.client import Completion, Events
from load_tests.fleet_api import FleetApi, amiss
from load_tests.prompts import random_prompt
from load_tests.servers import ServerFailed

MODEL, MAX_MODEL_LEN = "tiny-llama", 8192

ROOM_TOKENS = 292
"""Kept for the output, which must outlast the longest move: 40 steps for 8k tokens at pace a10."""

PAUSE_S, DEADLINE_S = 0.03, 120.0


class Api(FleetApi):
    """A client of one fleet. It makes another prompt for each stream."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        super().__init__(session, url)
        self._rng = random.Random(0)
        self._names = itertools.count()

    async def until_idle(self) -> list[str]:
        """Wait until both instances are up and no request is left. Answers their ids.

        Raises ServerFailed.
        """
        idle = await self.until(
            lambda overview: not amiss(overview, 2), DEADLINE_S, "two idle instances"
        )
        return [each["replica_id"] for each in idle["replicas"]]

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
