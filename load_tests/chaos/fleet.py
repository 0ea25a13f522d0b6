"""The admin API of a fleet that things happen to: it may not answer for a while."""

import asyncio
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

import aiohttp

from load_tests.servers import ServerFailed

ANSWER_S = aiohttp.ClientTimeout(total=70.0)
"""Longer than the fleet itself waits for a move."""

HELD = ("running", "waiting", "migrating_in", "migrating_out", "blocks_used")
PAUSE_S = 0.2

Overview = Mapping[str, Any]
"""What GET /fleet answers."""


class Fleet:
    """A client of one fleet."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = f"{url}/fleet"

    async def overview(self) -> Overview:
        """GET /fleet; of no replicas while nobody answers."""
        return await self._get("") or {"replicas": []}

    async def requests(self) -> list[dict[str, Any]]:
        """GET /fleet/requests; none while nobody answers."""
        return await self._get("/requests") or []

    async def place(self, request_id: str) -> str | None:
        """The instance that has a request, as far as is known."""
        request = await self._get(f"/requests/{request_id}") or {}
        return next(reversed(request.get("replicas", ())), None)

    async def migrate(self, request_id: str, destination: str | None = None) -> str:
        """Move a request. Answers `completed`, or why it did not."""
        body = {"request_id": request_id, "destination": destination}
        try:
            async with self._session.post(
                f"{self._url}/migrate", json=body, timeout=ANSWER_S
            ) as response:
                answer = await response.json()
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return "nobody answered"
        return answer["outcome"] if response.status == 200 else answer["error"]["message"]

    async def until_running(self, instances: int, within_s: float) -> None:
        """Wait until so many run and no other is there. Raises ServerFailed."""
        try:
            async with asyncio.timeout(within_s):
                while states(await self.overview()) != ["running"] * instances:
                    await asyncio.sleep(PAUSE_S)
        except TimeoutError:
            raise ServerFailed(f"not {instances} instances after {within_s:.0f} s") from None

    async def leaks(self, instances: int, within_s: float) -> list[str]:
        """Wait until all instances are there and hold nothing. What is amiss after that time."""
        amiss: list[str] = []
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while amiss := _amiss(await self.overview(), instances):
                    await asyncio.sleep(PAUSE_S)
        return amiss

    async def _get(self, path: str) -> Any:
        with suppress(aiohttp.ClientError, TimeoutError, ValueError):
            async with self._session.get(self._url + path, timeout=ANSWER_S) as response:
                if response.status == 200:
                    return await response.json()
        return None


def states(overview: Overview) -> list[str]:
    """Of all instances."""
    return [each["state"] for each in overview["replicas"]]


def held(overview: Overview) -> int:
    """Requests that instances have."""
    return sum(each["running"] + each["waiting"] for each in overview["replicas"])


def with_work(overview: Overview) -> set[str]:
    """The instances that have requests."""
    return {each["replica_id"] for each in overview["replicas"] if each["running"]}


def without(overview: Overview, replica_ids: Collection[str]) -> Overview:
    """The others."""
    others = [each for each in overview["replicas"] if each["replica_id"] not in replica_ids]
    return {**overview, "replicas": others}


def is_moving(overview: Overview, source: str, destination: str) -> bool:
    """Whether the KV of a request is on its way from one to the other, as far as can be seen."""
    loads = {each["replica_id"]: each for each in overview["replicas"]}
    leaving = loads.get(source, {}).get("migrating_out")
    return bool(leaving and loads.get(destination, {}).get("migrating_in"))


def _amiss(overview: Overview, instances: int) -> list[str]:
    found = [
        f"{each['replica_id']} still has {each[what]} {what}"
        for each in overview["replicas"]
        for what in HELD
        if each[what]
    ]
    if states(overview) != ["running"] * instances:
        found.append(f"instances: {', '.join(states(overview)) or 'none'}")
    return found
