"""What lies between simulated instances: calls that take a while, and links that copy KV blocks."""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from deployments.emulated.profile import Profile
from deployments.llumlet import Llumlet
from migration.peer import Peer
from migration.protocol.messages import Commit, Extend, Refused, Reserve, Reserved, Stage

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Delays:
    """Seconds that things take between processes, about as on two cores that are not busy.

    `submit`: from the client until the engine has the request. `deliver`: from the end of a step
    until the client has the token. `call`: there and back, between two deployments. `load`: from
    Serve's decision to start an instance until it takes requests.
    """

    submit: float = 0.015
    deliver: float = 0.003
    call: float = 0.003
    load: float = 30.0


@dataclass(slots=True)
class Network:
    """All instances of a fleet, by id, and the blocks that travel between them."""

    delays: Delays
    profile: Profile
    llumlets: dict[str, Llumlet] = field(default_factory=dict)
    under_way: dict[str, torch.Tensor] = field(default_factory=dict)

    async def call(self, answer: Callable[[], Awaitable[T]]) -> T:
        """Call another process."""
        await asyncio.sleep(self.delays.call / 2)
        result = await answer()
        await asyncio.sleep(self.delays.call / 2)
        return result

    def peer(self, replica_id: str) -> Peer:
        """That instance, as others see it."""
        return VirtualPeer(self, self.llumlets[replica_id])


class VirtualPeer:
    """Another instance as migration sees it (migration.peer.Peer)."""

    def __init__(self, network: Network, llumlet: Llumlet) -> None:
        self._network = network
        self._llumlet = llumlet

    async def connect(self, group: str) -> None:
        """Links are always there."""

    async def reserve(self, message: Reserve) -> Reserved | Refused:
        return await self._network.call(lambda: self._llumlet.reserve(message))

    async def extend(self, message: Extend) -> Reserved | Refused:
        return await self._network.call(lambda: self._llumlet.incoming.extend(message))

    async def receive(self, message: Stage) -> int:
        return await self._network.call(lambda: self._llumlet.incoming.receive(message))

    async def commit(self, message: Commit) -> None:
        await self._network.call(lambda: self._llumlet.incoming.commit(message))

    async def cancel(self, migration_id: str) -> bool:
        return await self._network.call(lambda: self._llumlet.incoming.cancel(migration_id))

    async def abort(self, request_id: str) -> None:
        await self._network.call(lambda: self._llumlet.abort(request_id))


class VirtualLinks:
    """Copies blocks as `migration.links.Links` does; the bytes are real, their way takes time."""

    def __init__(self, me: str, network: Network, kv: torch.Tensor) -> None:
        self._me = me
        self._network = network
        self._kv = kv
        self._locks: Mapping[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def expire(self) -> None:
        """Idle ones cost nothing here."""

    async def warm(self, destination: str, peer: Peer) -> None:
        """Links are always there."""

    async def send(
        self,
        destination: str,
        peer: Peer,
        block_ids: list[int],
        deliver: Callable[[str], Awaitable[T]],
    ) -> tuple[int, T]:
        """Send blocks while `deliver(group)` has the peer receive them: the bytes, its answer."""
        group = f"{self._me}>{destination}"
        async with self._locks[destination]:
            blocks = self._kv[block_ids]
            self._network.under_way[group] = blocks
            try:
                return blocks.nbytes, await deliver(group)
            finally:
                del self._network.under_way[group]

    async def join(self, group: str) -> None:
        """Links are always there."""

    async def receive(self, group: str, block_ids: list[int]) -> int:
        """Receive blocks into these."""
        blocks = self._network.under_way[group]
        tokens = len(block_ids) * self._kv.shape[1]
        await asyncio.sleep(self._network.profile.copy_time_s(tokens))
        self._kv[block_ids] = blocks
        return blocks.nbytes
