"""Pair groups from this instance to others: made when needed, dropped when one fails or idles."""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from migration.engine_seam import EngineSeam
from migration.peer import Peer, StepThread
from migration.snapshot import CannotMove

T = TypeVar("T")

POLL_S = 0.001
"""How often a copy is asked whether it has ended."""

logger = logging.getLogger("ray.serve.llumnix")


IDLE_S = 60.0
"""A link that nobody used for so long is given up: its peer may be gone for good. The receiving end
waits twice as long, or a sender would find its link dead."""


@dataclass(slots=True)
class _Link:
    """To a destination. `used_at`: by the event loop's clock."""

    group: str | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    used_at: float = 0.0


@dataclass(slots=True)
class _Joined:
    """From a source."""

    group: str
    used_at: float


class Links:
    """The data plane as the source and the destination use it.

    Transfers block, so the workers run them on threads of their own: the steps go on meanwhile.
    """

    def __init__(self, me: str, steps: StepThread, seam: EngineSeam, backend: str) -> None:
        self._me = me
        self._steps = steps
        self._seam = seam
        self._backend = backend
        self._links: dict[str, _Link] = {}
        self._joined: dict[str, _Joined] = {}
        self._names = itertools.count()
        self._leaving: set[asyncio.Task[Any]] = set()

    async def send(
        self,
        destination: str,
        peer: Peer,
        block_ids: list[int],
        deliver: Callable[[str], Awaitable[T]],
    ) -> tuple[int, T]:
        """Send blocks while `deliver(group)` has the peer receive them: the bytes, and its answer.

        One transfer at a time for each destination: the pair keeps no tags. A failure drops the
        link, so that neither side waits for the other any longer.
        """
        link = self._links.setdefault(destination, _Link())
        async with link.lock:
            group = await self._connected(link, destination, peer)
            link.used_at = _now()
            try:
                return await asyncio.gather(self._job("mig_send", group, block_ids), deliver(group))
            except BaseException:
                link.group = None
                self._leave(group)
                raise

    async def warm(self, destination: str, peer: Peer) -> None:
        """Connect ahead of the first transfer, which would pay for it while its request waits."""
        link = self._links.setdefault(destination, _Link())
        async with link.lock:
            await self._connected(link, destination, peer)

    async def join(self, group: str) -> None:
        """Be the receiving end of another instance's link, instead of an earlier one's."""
        source, _, _ = group.rpartition("#")
        if earlier := self._joined.pop(source, None):
            self._leave(earlier.group, "replaced")
        self._joined[source] = _Joined(group, _now())
        try:
            await self._job("mig_join", group, 1, self._backend)
        except Exception as error:
            self._part(source, group)
            raise CannotMove(f"the link did not come up: {error}") from None

    async def receive(self, group: str, block_ids: list[int]) -> int:
        """Receive blocks into these; a failure leaves the group, which its source then remakes."""
        source, _, _ = group.rpartition("#")
        if joined := self._joined.get(source):
            joined.used_at = _now()
        try:
            return await self._job("mig_receive", group, block_ids)
        except BaseException:
            self._part(source, group)
            raise

    def _part(self, source: str, group: str) -> None:
        """Leave a broken link from another instance, which may have replaced it already."""
        if (joined := self._joined.get(source)) and joined.group == group:
            del self._joined[source]
        self._leave(group)

    def expire(self) -> None:
        """Give up the links that are not used."""
        for destination, link in list(self._links.items()):
            if not link.lock.locked() and _now() - link.used_at > IDLE_S:
                del self._links[destination]
                if link.group is not None:
                    self._leave(link.group, "idle")
        for source, joined in list(self._joined.items()):
            if _now() - joined.used_at > 2 * IDLE_S:
                del self._joined[source]
                self._leave(joined.group, "idle")

    async def _connected(self, link: _Link, destination: str, peer: Peer) -> str:
        """The link's group, made if it is not there; under the link's lock."""
        if link.group is None:
            group = f"{self._me}>{destination}#{next(self._names)}"
            try:
                await asyncio.gather(
                    self._job("mig_join", group, 0, self._backend), peer.connect(group)
                )
            except BaseException:
                self._leave(group)
                raise
            link.group, link.used_at = group, _now()
            logger.info("kv link %s up", group)
        return link.group

    def _leave(self, group: str, why: str = "broken") -> None:
        """Without waiting for it: a request may be standing still meanwhile."""
        logger.info("kv link %s dropped: %s", group, why)
        leaving = asyncio.ensure_future(self._job("mig_leave", group))
        self._leaving.add(leaving)
        leaving.add_done_callback(self._left)

    def _left(self, leaving: asyncio.Task[Any]) -> None:
        self._leaving.discard(leaving)
        if not leaving.cancelled() and (error := leaving.exception()):
            logger.warning("kv link not left cleanly: %s", error)

    async def _job(self, method: str, *args: Any) -> Any:
        """Have every rank do it on a thread of its own; the bytes of all ranks, if there are any.

        A copy is not stopped when nobody waits for it any more: it ends by itself.
        """
        job = f"{method}/{next(self._names)}"
        await self._beside("mig_start", job, method, *args)
        while None in (results := await self._beside("mig_poll", job)):
            await asyncio.sleep(POLL_S)
        if failed := [result for result in results if isinstance(result, str)]:
            raise RuntimeError(failed[0])
        return sum(results)

    async def _beside(self, method: str, *args: Any) -> list[Any]:
        """Beside the steps where the worker lives in this process, else between two of them."""
        call = partial(self._seam.workers, method, *args)
        return call() if self._seam.in_process else await self._steps.run(call)


def _now() -> float:
    return asyncio.get_running_loop().time()
