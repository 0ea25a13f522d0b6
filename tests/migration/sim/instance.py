"""A replica, a source's way to another one, and a client, in virtual time.

Llumlet, MigrateOut, MigrateIn and Links are the real ones, put together as in
`deployments.instance`; the engine and its worker are simulated.
"""

import asyncio
import contextlib
import contextvars
from collections.abc import Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any

from deployments.llumlet import Llumlet
from load_tests.simulator import virtual_time
from migration import links
from migration.destination import Limits, MigrateIn
from migration.ownership import Outcome
from migration.peer import PeerLost
from migration.protocol.messages import Commit, Extend, Refused, Reserve, Reserved, Stage
from migration.protocol.timing import orphan_s
from migration.snapshot import Submission
from migration.source import MigrateOut
from tests.migration.sim.engine import SimEngine
from tests.migration.sim.kv import request_bytes, stream
from tests.migration.sim.scenario import Request
from tests.migration.sim.transport import SimWorker

if TYPE_CHECKING:
    from tests.migration.sim.world import World

LATE_TOKENS_S = 5.0
"""As app.fleet_client's GAP_S."""
HOUSEKEEPING_S = 1.0


class Instance:
    """One replica: what deployments.instance.Instance and LLMReplica put together."""

    def __init__(self, name: str, world: "World", engine: SimEngine) -> None:
        scenario, clock = world.scenario, world.loop.time
        self.name = name
        self.engine = engine
        self._broken = world.broken
        self.tasks: set[asyncio.Task[Any]] = set()
        self.daemons: list[asyncio.Task[Any]] = []
        self._context = contextvars.copy_context()
        self._context.run(virtual_time.HERE.set, self.tasks)
        worker = SimWorker(engine, world.wires, self.spawn, world.broken)
        engine.workers = worker.workers
        seam: Any = engine
        self.links = links.Links(name, engine, seam, "sim")
        self.llumlet = Llumlet(
            name,
            "",
            engine,  # type: ignore[arg-type]
            seam,  # type: ignore[arg-type]
            {},
            2,
            orphan_s(scenario.timeout_s),
            lambda *_: None,
            clock,
        )
        self.outgoing = MigrateOut(
            name,
            engine,
            seam,
            self.links,
            partial(Channel, world),
            scenario.timeout_s,
            scenario.max_stages,
            clock,
        )
        limits = Limits(2, scenario.timeout_s, scenario.keep_free)
        own, disown = self.llumlet.own, self.llumlet.disown
        self.incoming = MigrateIn(engine, seam, self.links, limits, own, disown, clock)
        self.llumlet.connect(self.outgoing, self.incoming)

    def start(self) -> None:
        """Step, and keep house."""
        self.daemons = [self.spawn(self.engine.steps()), self.spawn(self._keep_house())]
        for daemon in self.daemons:
            daemon.add_done_callback(self._ended)

    def _ended(self, daemon: "asyncio.Task[Any]") -> None:
        if not daemon.cancelled():
            self._broken(f"{self.name} crashed: {daemon.exception()!r}")

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """As a task of this instance, which ends with it."""
        return self._context.run(asyncio.get_running_loop().create_task, coroutine)

    def die(self) -> None:
        """All at once, and for good."""
        self.engine.dead = True
        for task in list(self.tasks):
            task.cancel()

    async def call(self, method: str, *args: Any) -> Any:
        """What LLMReplica passes on to whom."""
        if method == "connect":
            return await self.links.join(*args)
        owner: Any = self.llumlet if method in ("submit", "attach", "abort") else self.incoming
        return await getattr(owner, method)(*args)

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            await self.llumlet.housekeeping()

    def left_over(self) -> str:
        """What should not be there once all requests are over; nothing where all is well."""
        engine = self.engine
        left = {
            "requests": list(engine.requests),
            "parked": list(engine.parked),
            "reservations": engine.reserved,
            "blocks": engine.blocks_total - len(engine.pool.free),
            "moves": len(self.incoming),
            "owned": list(self.llumlet.owned),
            "tasks": [task.get_coro() for task in self.tasks if task not in self.daemons],
        }
        return ", ".join(f"{name} {what}" for name, what in left.items() if what)


class Channel:
    """A destination as a source reaches it (migration.peer.Peer), over Serve."""

    def __init__(self, world: "World", destination: str) -> None:
        self._send = partial(world.send, world.instances[destination])

    async def connect(self, group: str) -> None:
        await self._send("connect", group)

    async def reserve(self, message: Reserve) -> Reserved | Refused:
        return await self._send("reserve", message)

    async def extend(self, message: Extend) -> Reserved | Refused:
        return await self._send("extend", message)

    async def receive(self, message: Stage) -> int:
        return await self._send("receive", message)

    async def commit(self, message: Commit) -> None:
        await self._send("commit", message)

    async def cancel(self, migration_id: str) -> bool:
        return await self._send("cancel", migration_id)

    async def abort(self, request_id: str) -> None:
        await self._send("abort", request_id)


class Client:
    """One request as the ingress sees it: an open call, and tokens with their index."""

    def __init__(self, world: "World", number: int, request: Request) -> None:
        prompt = [7] * min(6, request.prompt) + [number] * max(0, request.prompt - 6)
        data = request_bytes(prompt, request.most)
        self.submission = Submission(f"r{number}", f"p{number}", data, len(prompt), "normal", "i")
        self.expected = stream(data)
        self.state = "new"
        self.detail = ""
        self.replicas: list[str] = []
        self.received: set[int] = set()
        self._world = world
        self._first = request.where
        self._call: asyncio.Task[None] | None = None

    @property
    def ended(self) -> bool:
        return self.state not in ("new", "running")

    def submit(self) -> None:
        """The request arrives."""
        self._call = self._world.spawn(self._hold())

    def take(self, first: int, token: int, last: bool) -> None:
        """A token from whoever owns the request, or thinks that it does."""
        if first >= len(self.expected) or token != self.expected[first]:
            self._world.broken(f"{self.submission.request_id}: token {first} is wrong")
        elif last != (first + 1 == len(self.expected)):
            self._world.broken(f"{self.submission.request_id}: ends at token {first}")
        self.received.add(first)
        if len(self.received) == len(self.expected) and not self.ended:
            self.state = "finished"

    def abort(self) -> None:
        """The client leaves: FleetClient._abort."""
        if self.ended or self._call is None:
            return
        self.state = "aborted"
        self._call.cancel()
        if self.replicas:
            self._world.spawn(self._abort_at(self.replicas[-1]))

    async def _hold(self) -> None:
        where, request_id = self._first, self.submission.request_id
        try:
            outcome: Outcome = await self._world.call(where, "submit", self.submission)
            while outcome.kind == "moved" and not self.ended:
                assert outcome.destination is not None
                where = outcome.destination
                outcome = await self._world.call(where, "attach", request_id)
        except PeerLost:
            return self._fail(
                f"{where} was lost", forgiven=self._world.instances[where].engine.dead
            )
        if outcome.kind != "finished":
            return self._fail(f"{where} says {outcome.kind}")
        await asyncio.sleep(LATE_TOKENS_S)
        self._fail("tokens are missing")

    def _fail(self, detail: str, *, forgiven: bool = False) -> None:
        if self.ended:
            return
        self.state, self.detail = "failed", detail
        if not forgiven:
            self._world.broken(f"{self.submission.request_id} failed: {detail}")

    async def _abort_at(self, where: str) -> None:
        with contextlib.suppress(PeerLost):
            await self._world.call(where, "abort", self.submission.request_id)
