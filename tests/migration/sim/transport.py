"""The workers' side of a copy in virtual time: pair groups, and blocks one by one through them."""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal

from deployments.engine_loop import EngineDead
from tests.migration.sim.engine import BLOCK, SimEngine

PAIR_TIMEOUT_S = 20.0
"""As in migration.transport."""
TICK_S = 0.05
MOST_UNDER_WAY = 2

CopyFate = Literal["break", "hang", "slow"]


@dataclass(frozen=True, slots=True)
class CopyFault:
    """What happens to the n-th copy of all when it comes to one of its blocks."""

    nth: int
    block: int
    fate: CopyFate


@dataclass(slots=True)
class Pair:
    """A pair group: what the source has sent and the destination has not taken yet."""

    joined: set[int] = field(default_factory=set)
    under_way: deque[list[int]] = field(default_factory=deque)
    closed: bool = False
    copying: int = 0
    left: bool = False


class Wires:
    """All pair groups. `leaving_breaks`: leaving a group ends its copies, as NCCL may."""

    writes = True

    def __init__(self, block_s: float, faults: tuple[CopyFault, ...], leaving_breaks: bool) -> None:
        self.block_s = block_s
        self.leaving_breaks = leaving_breaks
        self.pairs: dict[str, Pair] = {}
        self._faults = {fault.nth: fault for fault in faults}
        self._copies = 0

    def next_fault(self) -> CopyFault | None:
        """What the copy that begins now has ahead of it."""
        self._copies += 1
        return self._faults.get(self._copies - 1)

    def cut(self) -> None:
        """One end of all died."""
        for pair in self.pairs.values():
            pair.closed = True


class SimWorker:
    """The worker of one engine: `workers` plays EngineSeam.workers for migration.links."""

    def __init__(
        self,
        engine: SimEngine,
        wires: Wires,
        spawn: Callable[[Coroutine[Any, Any, int]], "asyncio.Task[int]"],
        broken: Callable[[str], None],
    ) -> None:
        self._engine = engine
        self._wires = wires
        self._spawn = spawn
        self._broken = broken
        self._jobs: dict[str, asyncio.Task[int]] = {}

    def workers(self, method: str, *args: Any) -> list[Any]:
        """Begin a job, or ask what became of one."""
        if self._engine.dead:
            raise EngineDead("it died")
        job = args[0]
        if method == "mig_start":
            self._jobs[job] = self._spawn(getattr(self, args[1])(*args[2:]))
            return [None]
        return [self._jobs[job].result() if self._jobs[job].done() else None]

    async def mig_join(self, group: str, rank: int, backend: str) -> int:
        pair = self._wires.pairs.setdefault(group, Pair())
        pair.joined.add(rank)
        await self._until(pair, lambda: len(pair.joined) == 2)
        return 0

    async def mig_leave(self, group: str) -> int:
        if pair := self._wires.pairs.get(group):
            pair.left = True
            pair.closed |= self._wires.leaving_breaks or not pair.copying
        return 0

    async def mig_send(self, group: str, block_ids: list[int]) -> int:
        fault = self._wires.next_fault()
        pair = self._begin(group)
        try:
            for number, block in enumerate(block_ids):
                kv = list(self._engine.pool.contents[block])
                await asyncio.sleep(self._wires.block_s)
                if fault is not None and fault.block == number:
                    await self._suffer(pair, fault)
                await self._until(pair, lambda: len(pair.under_way) < MOST_UNDER_WAY)
                pair.under_way.append(kv)
        finally:
            self._end(pair)
        return len(block_ids) * BLOCK

    async def mig_receive(self, group: str, block_ids: list[int]) -> int:
        pair = self._begin(group)
        try:
            for block in block_ids:
                await self._until(pair, lambda: bool(pair.under_way))
                kv = pair.under_way.popleft()
                await asyncio.sleep(self._wires.block_s / 2)
                self._write(block, kv)
        finally:
            self._end(pair)
        return len(block_ids) * BLOCK

    def _write(self, block: int, kv: list[int]) -> None:
        if not any(block in reservation.block_ids for reservation in self._engine.reserved):
            self._broken(f"a copy wrote into block {block}, which is not reserved (any more)")
        if self._wires.writes:
            self._engine.pool.contents[block][:] = kv

    def _begin(self, group: str) -> Pair:
        pair = self._wires.pairs.get(group)
        if pair is None or pair.closed or len(pair.joined) < 2:
            raise ConnectionError(f"{group} is not joined")
        pair.copying += 1
        return pair

    @staticmethod
    def _end(pair: Pair) -> None:
        pair.copying -= 1
        pair.closed |= pair.left

    async def _suffer(self, pair: Pair, fault: CopyFault) -> None:
        if fault.fate == "break":
            pair.closed = True
        await asyncio.sleep(1.0 if fault.fate == "slow" else TICK_S)
        if fault.fate == "hang":
            await self._until(pair, lambda: False)

    @staticmethod
    async def _until(pair: Pair, ready: Callable[[], bool]) -> None:
        """Raises ConnectionError where the pair is closed, TimeoutError after PAIR_TIMEOUT_S."""
        deadline = asyncio.get_running_loop().time() + PAIR_TIMEOUT_S
        while not ready():
            if pair.closed:
                raise ConnectionError("the pair is closed")
            if asyncio.get_running_loop().time() > deadline:
                pair.closed = True
                raise TimeoutError("nothing came in time")
            await asyncio.sleep(TICK_S)
