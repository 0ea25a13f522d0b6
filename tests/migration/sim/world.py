"""Two instances, their clients and the network between them, in virtual time.

`play` runs a scenario to its end and answers what went wrong: nothing, it is hoped.
"""

import asyncio
import contextvars
import logging
from collections import Counter
from collections.abc import Coroutine
from typing import Any
from unittest import mock

from deployments.pinned import CALL_TIMEOUT_S
from load_tests.simulator import virtual_time
from migration import links
from migration.ownership import Owned
from migration.peer import PeerLost
from migration.protocol.timing import SETTLE_PAUSE_S, SETTLE_TRIES
from migration.snapshot import CannotMove, MigrationRecord
from tests.migration.sim.engine import SimEngine
from tests.migration.sim.instance import Client, Instance
from tests.migration.sim.scenario import Event, Fault, Scenario
from tests.migration.sim.steps import SimSteps, Watcher
from tests.migration.sim.transport import TICK_S, Wires

LONGEST_RUN_S = 400.0
REST_S = 0.5


class World(Watcher):
    """The two instances A and B, and all that happens to them."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.loop = asyncio.get_running_loop()
        self.problems: list[str] = []
        self.records: list[MigrationRecord] = []
        self.wires = Wires(scenario.block_s, scenario.copies, scenario.leaving_breaks)
        self.instances: dict[str, Instance] = {}
        self._network = contextvars.Context()
        self._under_way = 0
        self._sent: Counter[str] = Counter()
        self._faults: dict[tuple[str, int], Fault] = {
            (fault.message, fault.nth): fault for fault in scenario.faults
        }
        self._hops = 0
        self._waiting = [event for event in scenario.events if event.on is not None]
        self._request_of: dict[str, str] = {}
        self._unanswered: Counter[str] = Counter()
        self._partitioned: set[str] = set()
        self._left_by: list[tuple[Instance, Owned]] = []
        for name, blocks in zip("AB", scenario.blocks, strict=True):
            self.instances[name] = Instance(name, self, self._engine(name, blocks))
        self.clients = [Client(self, i, request) for i, request in enumerate(scenario.requests)]

    def _engine(self, name: str, blocks: int) -> SimEngine:
        scenario = self.scenario
        engine = SimEngine(name, blocks, scenario.step_s, scenario.depth, scenario.answer_s, self)
        engine.grammar_s = scenario.grammar_s
        return engine

    async def run(self) -> None:
        """Until all is at rest, or should be."""
        for instance in self.instances.values():
            instance.start()
        for client, request in zip(self.clients, self.scenario.requests, strict=True):
            self.loop.call_later(request.at, client.submit)
        timed = [event for event in self.scenario.events if event.on is None]
        for event in timed:
            self.loop.call_later(event.after, self._fire, event)
        busy_until = max(event.after for event in (*timed, *self.scenario.events))
        while left := self._left_over(busy_until):
            if self.loop.time() > LONGEST_RUN_S:
                return self.broken(f"not at rest after {LONGEST_RUN_S} s: {left}")
            await asyncio.sleep(REST_S)
        self._check_flags()

    def _left_over(self, busy_until: float) -> str:
        if self._under_way or self.loop.time() < busy_until:
            return "messages or events"
        if waiting := [c.submission.request_id for c in self.clients if not c.ended]:
            return f"clients of {waiting}"
        live = [i for i in self.instances.values() if not i.engine.dead]
        return "; ".join(f"{i.name}: {left}" for i in live if (left := i.left_over()))

    def _check_flags(self) -> None:
        for instance, owned in self._left_by:
            if not instance.engine.dead and (owned.migrating or owned.committing):
                self.broken(f"{owned.submission.request_id} is on the move for ever")
        scenario = self.scenario
        longest = 3 * scenario.timeout_s + SETTLE_TRIES * SETTLE_PAUSE_S + 1.0
        longest += sum(event.seconds for event in scenario.events)
        for instance in self.instances.values():
            if instance.engine.longest_stop > longest:
                self.broken(f"stood still for {instance.engine.longest_stop} s")

    # --- what engines say (Watcher) ---

    def broken(self, what: str) -> None:
        self.problems.append(f"{self.loop.time():.3f} s: {what}")

    def happened(self, what: str) -> None:
        """A message was sent, or something happened in an engine: events may hang on it."""
        for event in [event for event in self._waiting if event.on == what]:
            self._waiting.remove(event)
            self.loop.call_later(event.after, self._fire, event)

    def boundary(self) -> None:
        """Never two owners, and never none."""
        live = [i.engine for i in self.instances.values() if not i.engine.dead]
        for client in self.clients:
            request_id = client.submission.request_id
            if client.state != "running":
                continue
            owners = [e for e in live if request_id in e.requests and request_id not in e.parked]
            if len(owners) > 1 and request_id not in self._partitioned:
                self.broken(f"{request_id} has two owners")
            held = any(request_id in e.requests or request_id in e.done for e in live)
            if len(live) == len(self.instances) and not held:
                self.broken(f"{request_id} has no owner")

    def owned(self, engine: SimSteps, request_id: str) -> None:
        """FleetClient hears of a new owner before of its first token."""
        client = self._client(request_id)
        client.replicas.append(engine.name)
        if client.state == "new":
            client.state = "running"
            self.happened(request_id)

    def emitted(
        self, engine: SimSteps, request_id: str, first: int, token: int, last: bool
    ) -> None:
        """To the client, and to the llumlet where it was the last."""
        late = self.scenario.token_s if engine.name == "A" else 0.0
        self.loop.call_later(late, self._client(request_id).take, first, token, last)
        if last:
            finished = self.instances[engine.name].llumlet.finished
            self.loop.call_later(self.scenario.answer_s, finished, [request_id])

    def _client(self, request_id: str) -> Client:
        return self.clients[int(request_id[1:])]

    # --- what happens ---

    def _fire(self, event: Event) -> None:
        client = self.clients[event.request % len(self.clients)]
        instance = self.instances[event.where]
        match event.kind:
            case "move" if client.replicas and not client.ended:
                owner = self.instances[client.replicas[-1]]
                if not owner.engine.dead:
                    owner.spawn(self._move(owner, client))
            case "abort":
                client.abort()
            case "preempt" if not instance.engine.dead:
                instance.engine.preempt_soon(client.submission.request_id)
            case "hang":
                instance.engine.hang(event.seconds)
            case "die":
                instance.die()
                self.wires.cut()

    async def _move(self, source: Instance, client: Client) -> None:
        request_id = client.submission.request_id
        destination = self.instances["B" if source.name == "A" else "A"]
        installed = destination.engine.installed
        before = installed.count(request_id)
        owned = source.llumlet.owned.get(request_id)
        try:
            record = await source.llumlet.migrate_out(request_id, destination.name, "admin")
        except CannotMove:
            return
        assert owned is not None
        self.records.append(record)
        self._left_by.append((source, owned))
        kind = owned.outcome.result().kind if owned.outcome.done() else "here"
        if record.outcome == "completed":
            if installed.count(request_id) == before:
                self.broken(f"{request_id}: completed, but the destination never had it")
            if kind not in ("moved", "aborted"):
                self.broken(f"{request_id}: completed, but the source says {kind}")
        elif kind == "moved":
            self.broken(f"{request_id}: the source says moved, the record {record.outcome}")

    # --- the network ---

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """As a task of the network, which outlives the instances."""
        return self._network.run(self.loop.create_task, coroutine)

    async def send(self, to: Instance, name: str, *args: Any) -> Any:
        """A message of the protocol, with the fate that the scenario has for it."""
        fault = self._faults.get((name, self._sent[name]))
        self._sent[name] += 1
        if name == "reserve":
            self._request_of[args[0].migration_id] = args[0].snapshot.submission.request_id
        self.happened(name)
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await self._send(to, name, args, fault)
        except BaseException:
            if name == "cancel":
                self._count_silence(args[0])
            raise

    def _count_silence(self, migration_id: str) -> None:
        """So many unanswered cancels follow on a COMMIT only: the two cannot reach each other."""
        self._unanswered[migration_id] += 1
        if self._unanswered[migration_id] >= SETTLE_TRIES:
            self._partitioned.add(self._request_of[migration_id])

    async def _send(
        self, to: Instance, name: str, args: tuple[Any, ...], fault: Fault | None
    ) -> Any:
        fate, seconds = (fault.fate, fault.seconds) if fault is not None else ("", 0.0)
        delay = self._delay()
        if fate == "lost":
            await self._for_ever()
        if fate == "unreachable":
            await asyncio.sleep(delay)
            raise PeerLost("not reachable")
        late = delay + (seconds if fate == "late" else 0.0)
        delivery = self.spawn(self._deliver(to, name, args, late))
        if fate == "twice":
            self.spawn(self._deliver(to, name, args, delay + seconds))
        if fate == "cut":
            await asyncio.sleep(seconds)
            raise PeerLost("the connection was cut")
        try:
            answer = await asyncio.shield(delivery)
        except asyncio.CancelledError:
            if self.scenario.cancels_travel:
                self.loop.call_later(delay, delivery.cancel)
            raise
        if fate == "answer lost":
            await self._for_ever()
        return answer

    async def call(self, where: str, method: str, *args: Any) -> Any:
        """A call of the ingress: nothing happens to it but the death of who is called."""
        return await self._deliver(self.instances[where], method, args, self._delay(), client=True)

    async def _deliver(
        self, to: Instance, name: str, args: tuple[Any, ...], delay: float, client: bool = False
    ) -> Any:
        await self._on_its_way(delay)
        if to.engine.dead:
            await self._lose(client)
        handler = to.spawn(to.call(name, *args))
        try:
            await asyncio.wait([handler])
        except asyncio.CancelledError:
            handler.cancel()
            raise
        if handler.cancelled() or (handler.exception() is not None and to.engine.dead):
            await self._lose(client)
        await self._on_its_way(self._delay())
        return handler.result()

    async def _lose(self, client: bool) -> None:
        if self.scenario.silent_death and not client:
            await self._for_ever()
        await asyncio.sleep(TICK_S)
        raise PeerLost("it died")

    async def _on_its_way(self, delay: float) -> None:
        self._under_way += 1
        try:
            await asyncio.sleep(delay)
        finally:
            self._under_way -= 1

    async def _for_ever(self) -> None:
        await self.loop.create_future()

    def _delay(self) -> float:
        self._hops += 1
        return self.scenario.delays[self._hops % len(self.scenario.delays)]


async def _play(scenario: Scenario) -> World:
    world = World(scenario)
    await world.run()
    return world


def play(scenario: Scenario) -> World:
    """Run it to its end; `problems` should then be empty."""
    with (
        mock.patch.object(links, "POLL_S", TICK_S),
        mock.patch.object(logging.getLogger("ray.serve.llumnix"), "disabled", True),
    ):
        return virtual_time.run(_play(scenario))
