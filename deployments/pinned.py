"""Calls to one particular replica, and what their failures mean."""

import asyncio
import contextvars
import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from migration.peer import PeerLost
from migration.protocol.messages import Commit, Extend, Refused, Reserve, Reserved, Stage
from migration.snapshot import CannotMove

CALL_TIMEOUT_S = 30.0


class ReplicaGone(Exception):
    """The replica that a call was pinned to is not (or no longer) part of the deployment."""


def pinned(handle: DeploymentHandle, replica_id: str) -> DeploymentHandle:
    """A handle whose calls go to this replica or fail with ReplicaGone; our router obeys it.

    Serve has no notion of a pinned call; the session id is the one field of a handle's options that
    reaches the router and means "always the same replica".
    """
    return handle.options(session_id=replica_id, _by_reference=False)


def call(handle: DeploymentHandle, method: str, *args: Any) -> Awaitable[Any]:
    """Call a method, outside of the present request's context.

    Sibling calls made inside one Serve request share its id, by which Serve's router mixes them up.
    """
    return contextvars.Context().run(handle.options(method_name=method).remote, *args)


async def ask(handle: DeploymentHandle, method: str, *args: Any) -> Any:
    """`call`, for a method whose answer may be a refusal. Raises CannotMove then."""
    answer = await call(handle, method, *args)
    if isinstance(answer, CannotMove):
        raise answer
    return answer


def answers_refusals(
    method: Callable[..., Coroutine[Any, Any, Any]],
) -> Callable[..., Coroutine[Any, Any, Any]]:
    """A replica's method that answers a CannotMove instead of raising it; `ask` raises it again.

    Of whatever a method raises Serve logs a traceback, and a refusal is nothing to be alarmed by.
    """

    @functools.wraps(method)
    async def answering(*args: Any) -> Any:
        try:
            return await method(*args)
        except CannotMove as refusal:
            return refusal

    return answering


class ServePeer:
    """Another replica as migration sees it (migration.peer.Peer)."""

    def __init__(self, handle: DeploymentHandle, replica_id: str) -> None:
        self._handle = pinned(handle, replica_id)
        self._replica_id = replica_id

    async def connect(self, group: str) -> None:
        await self._call("connect", group)

    async def reserve(self, message: Reserve) -> Reserved | Refused:
        return await self._call("reserve", message)

    async def extend(self, message: Extend) -> Reserved | Refused:
        return await self._call("extend", message)

    async def receive(self, message: Stage) -> int:
        return await self._call("receive", message)

    async def commit(self, message: Commit) -> None:
        await self._call("commit", message)

    async def cancel(self, migration_id: str) -> bool:
        return await self._call("cancel", migration_id)

    async def abort(self, request_id: str) -> None:
        await self._call("abort", request_id, True)

    async def _call(self, method: str, *args: Any) -> Any:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await ask(self._handle, method, *args)
        except (ReplicaGone, RayActorError) as error:
            raise PeerLost(f"{self._replica_id} is gone") from error
