"""The client of a fleet's admin API, which may not answer for a while."""

import asyncio
from collections.abc import Callable, Collection, Mapping
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


class NotMoved(ServerFailed):
    """Why a request was not moved, as the fleet says it."""


class FleetApi:
    """A client of one fleet."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session, self.url = session, url

    async def overview(self) -> Overview:
        """GET /fleet; of no replicas while nobody answers."""
        with suppress(ServerFailed):
            return await self._get("/fleet")
        return {"replicas": []}

    async def requests(self) -> list[dict[str, Any]]:
        """GET /fleet/requests. Raises ServerFailed while nobody answers."""
        return await self._get("/fleet/requests")

    async def place(self, request_id: str) -> str | None:
        """The instance that has a request, as far as is known."""
        with suppress(ServerFailed):
            request = await self._get(f"/fleet/requests/{request_id}")
            return next(reversed(request["replicas"]), None)
        return None

    async def migrate(self, request_id: str, destination: str | None = None) -> dict[str, Any]:
        """The record of a completed move. Raises NotMoved; ServerFailed where nobody answers."""
        body = {"request_id": request_id, "destination": destination}
        url = f"{self.url}/fleet/migrate"
        try:
            async with self.session.post(url, json=body, timeout=ANSWER_S) as response:
                if response.status == 200:
                    return await response.json()
                raise NotMoved(f"{request_id} was not moved: {await response.text()}")
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise ServerFailed(f"POST /fleet/migrate: {error!r}") from None

    async def until(
        self, condition: Callable[[Overview], bool], within_s: float, what: str
    ) -> Overview:
        """The first overview that meets the condition. Raises ServerFailed: no `what`."""
        try:
            async with asyncio.timeout(within_s):
                while not condition(overview := await self.overview()):
                    await asyncio.sleep(PAUSE_S)
        except TimeoutError:
            raise ServerFailed(f"no {what} after {within_s:.0f} s") from None
        return overview

    async def until_running(
        self, instances: int, within_s: float, but: Collection[str] = ()
    ) -> set[str]:
        """Wait until so many run and no other is there, none of `but` either. Answers their ids.

        Raises ServerFailed.
        """
        overview = await self.until(
            lambda overview: settled(overview, instances, but), within_s, f"{instances} instances"
        )
        return {each["replica_id"] for each in overview["replicas"]}

    async def leaks(self, instances: int, within_s: float) -> list[str]:
        """Wait until all instances are there and hold nothing. What is amiss after that time."""
        try:
            await self.until(lambda overview: not amiss(overview, instances), within_s, "rest")
        except ServerFailed:
            return amiss(await self.overview(), instances)
        return []

    async def _get(self, path: str) -> Any:
        try:
            async with self.session.get(self.url + path, timeout=ANSWER_S) as response:
                response.raise_for_status()
                return await response.json()
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise ServerFailed(f"GET {path}: {error!r}") from None


def states(overview: Overview) -> list[str]:
    """Of all instances."""
    return [each["state"] for each in overview["replicas"]]


def settled(overview: Overview, instances: int, but: Collection[str] = ()) -> bool:
    """Whether so many run, no other is there, and none of `but`."""
    here = states(without(overview, but))
    return here == states(overview) == ["running"] * instances


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


def amiss(overview: Overview, instances: int) -> list[str]:
    """What a fleet at rest would not show."""
    found = [
        f"{each['replica_id']} still has {each[what]} {what}"
        for each in overview["replicas"]
        for what in HELD
        if each[what]
    ]
    if states(overview) != ["running"] * instances:
        found.append(f"instances: {', '.join(states(overview)) or 'none'}")
    return found
