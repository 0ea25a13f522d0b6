"""Pair groups from this instance to others: made when first needed, dropped when one fails."""

import asyncio
import itertools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from migration.engine_seam import EngineSeam
from migration.peer import Peer

logger = logging.getLogger("ray.serve.llumnix")


@dataclass(slots=True)
class _Link:
    group: str | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Links:
    """The data plane as the source and the destination use it.

    Transfers block, so they run on threads of their own: the step thread goes on meanwhile.
    """

    def __init__(self, me: str, seam: EngineSeam, backend: str, threads: int) -> None:
        self._me = me
        self._seam = seam
        self._backend = backend
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="kv-copy")
        self._links: dict[str, _Link] = {}
        self._names = itertools.count()

    async def send(self, destination: str, peer: Peer, transfer: "Transfer") -> int:
        """Send blocks while the peer receives them; answers the bytes. A failure drops the link.

        One transfer at a time for each destination: the pair keeps no tags.
        """
        link = self._links.setdefault(destination, _Link())
        async with link.lock:
            group = await self._joined(link, destination, peer)
            try:
                sent, received = await asyncio.gather(
                    self._blocking("mig_send", group, transfer.block_ids),
                    peer.receive(
                        transfer.migration_id, group, transfer.first, len(transfer.block_ids)
                    ),
                )
                if sent != received:
                    raise ConnectionError(f"sent {sent} bytes, {received} arrived")
                return sent
            except BaseException:
                await self._drop(link)
                raise

    async def warm(self, destination: str, peer: Peer) -> None:
        """Connect ahead of the first transfer, which would pay for it while its request waits."""
        link = self._links.setdefault(destination, _Link())
        async with link.lock:
            await self._joined(link, destination, peer)

    async def join(self, group: str) -> None:
        """Be the receiving end of another instance's link."""
        await self._blocking("mig_join", group, 1, self._backend)

    async def receive(self, group: str, block_ids: list[int]) -> int:
        """Receive blocks into these; a failure leaves the group, which its source then remakes."""
        try:
            return await self._blocking("mig_receive", group, block_ids)
        except BaseException:
            await self._blocking("mig_leave", group)
            raise

    async def _joined(self, link: _Link, destination: str, peer: Peer) -> str:
        """The link's group, made if it is not there; under the link's lock."""
        if link.group is None:
            link.group = await self._connect(destination, peer)
        return link.group

    async def _connect(self, destination: str, peer: Peer) -> str:
        group = f"{self._me}>{destination}#{next(self._names)}"
        try:
            await asyncio.gather(
                self._blocking("mig_join", group, 0, self._backend), peer.connect(group)
            )
        except BaseException:
            await self._blocking("mig_leave", group)
            raise
        logger.info("kv link %s up", group)
        return group

    async def _drop(self, link: _Link) -> None:
        group, link.group = link.group, None
        if group is not None:
            logger.warning("kv link %s dropped", group)
            await self._blocking("mig_leave", group)

    async def _blocking(self, method: str, *args: Any) -> Any:
        call: Callable[[], list[Any]] = partial(self._seam.workers, method, *args)
        results = await asyncio.get_running_loop().run_in_executor(self._threads, call)
        return sum(results) if isinstance(results[0], int) else results[0]


@dataclass(frozen=True, slots=True)
class Transfer:
    """Blocks to send: the request's blocks from index `first` on, by their ids at the source."""

    migration_id: str
    first: int
    block_ids: list[int]
