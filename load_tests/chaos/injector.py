"""Makes the faults happen: kills and stops processes of one fleet, at bad moments too."""

import asyncio
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

from load_tests.chaos.crowd import Crowd
from load_tests.chaos.faults import TAKES, Event, Fault, Kind, picked, plan
from load_tests.chaos.processes import INGRESS, SCHEDULER, Processes
from load_tests.chaos.scenarios import Scenario
from load_tests.fleet_api import FleetApi, is_moving, with_work
from load_tests.servers import ServerFailed

PAUSE_S, BACK_S = 0.3, 180.0
"""Between two looks at who is up, and the longest that a killed process may take to come back."""

CATCH_S = 20.0
"""For a move to be seen on its way; else an instance is killed without."""

MOVE_S = 0.5
"""A request moves so often, beside what the Scheduler has moved."""

BURST = 64
"""Streams; with those of the users, more than four instances of 512 blocks hold."""


class Injector:
    """`events`: what happened. `down`: instances that are killed or stopped."""

    def __init__(
        self, fleet: FleetApi, processes: Processes, crowd: Crowd, scenario: Scenario, seed: int
    ) -> None:
        self.events: list[Event] = []
        self.down: set[str] = set()
        self._fleet = fleet
        self._processes = processes
        self._crowd = crowd
        self._scenario = scenario
        self._seed = seed
        self._rng = random.Random(f"injector/{seed}")
        self._stopped: dict[str, psutil.Process] = {}
        self._moves: set[asyncio.Task[None]] = set()

    @property
    def kills(self) -> int:
        """Processes killed so far."""
        return sum(len(event.killed) for event in self.events)

    async def run(self) -> None:
        """One fault after the other, for ever. Whatever ends it, all that was stopped goes on.

        Raises ServerFailed where a process does not come back.
        """
        try:
            for fault in plan(self._scenario.deck, self._scenario.every_s, self._seed):
                await asyncio.sleep(fault.after_s)
                await self._until_enough(fault.kind)
                await self._happen(fault)
        finally:
            for victim in list(self._stopped):
                self._go_on(victim)
            for move in self._moves:
                move.cancel()

    async def keep_moving(self) -> None:
        """Move random requests to where most memory is free, for ever."""
        while True:
            await asyncio.sleep(MOVE_S)
            if running := self._running():
                await self._move(self._rng.choice(running))

    async def _happen(self, fault: Fault) -> None:
        match fault.kind:
            case "source" | "destination" | "both ends":
                await self._kill_in_a_move(fault)
            case "burst":
                self._happened("burst")
                self._crowd.burst(BURST)
            case "scheduler":
                self._kill_one_of(SCHEDULER, fault)
            case "ingress":
                self._kill_one_of(INGRESS, fault)
            case "short hang" | "long hang":
                self._stop(fault, *picked(await self._busy(), fault.pick))
            case "kill":
                self._kill("kill", *picked(await self._busy(), fault.pick))

    async def _kill_in_a_move(self, fault: Fault) -> None:
        ends = await self._moving()
        if ends is None:
            self._kill("kill", *picked(await self._busy(), fault.pick))
        elif fault.kind == "both ends":
            self._kill(fault.kind, *ends)
        else:
            self._kill(fault.kind, ends[0] if fault.kind == "source" else ends[1])

    def _kill(self, kind: Kind, *victims: str) -> None:
        processes = [self._processes.instance(victim) for victim in victims]
        self.down |= set(victims)
        self._happened(kind, *victims)
        for process in processes:
            _send(process, signal.SIGKILL)

    def _kill_one_of(self, deployment: str, fault: Fault) -> None:
        processes = {str(process.pid): process for process in self._processes.of(deployment)}
        (chosen,) = picked(list(processes), fault.pick)
        self._happened(fault.kind, deployment)
        _send(processes[chosen], signal.SIGKILL)

    def _stop(self, fault: Fault, victim: str) -> None:
        self._stopped[victim] = self._processes.instance(victim)
        self.down.add(victim)
        self._happened(fault.kind, victim, hang_s=fault.hang_s)
        _send(self._stopped[victim], signal.SIGSTOP)
        asyncio.get_running_loop().call_later(fault.hang_s, self._go_on, victim)

    def _go_on(self, victim: str) -> None:
        if process := self._stopped.pop(victim, None):
            _send(process, signal.SIGCONT)
            self.down.discard(victim)

    def _happened(self, kind: Kind, *victims: str, hang_s: float = 0.0) -> None:
        self.events.append(Event(time.perf_counter(), kind, victims, hang_s))

    async def _until_enough(self, kind: Kind) -> None:
        """Wait until the fault leaves as many as it must."""
        match kind:
            case "scheduler":
                await self._until(lambda: bool(self._processes.of(SCHEDULER)), "no Scheduler")
            case "ingress":
                await self._until(lambda: len(self._processes.of(INGRESS)) > 1, "no two ingresses")
            case _:
                wanted = self._scenario.survivors + TAKES.get(kind, 0)
                await self._until(lambda: len(self._alive()) >= wanted, f"no {wanted} instances")

    async def _until(self, condition: Callable[[], bool], lack: str) -> None:
        try:
            async with asyncio.timeout(BACK_S):
                while not condition():
                    await asyncio.sleep(PAUSE_S)
        except TimeoutError:
            raise ServerFailed(f"{lack} after {BACK_S:.0f} s") from None

    def _alive(self) -> list[str]:
        return [name for name in self._processes.instances() if name not in self.down]

    async def _busy(self) -> list[str]:
        """Those alive that have work, where any has: others would not be missed."""
        alive, busy = self._alive(), with_work(await self._fleet.overview())
        return [name for name in alive if name in busy] or alive

    # --- moves -------------------------------------------------------------------------------

    async def _moving(self) -> tuple[str, str] | None:
        """Source and destination of a move of ours that is on its way; None where none was seen."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CATCH_S):
                while True:
                    if ends := await self._try_to_move():
                        return ends
                    await asyncio.sleep(0)
        return None

    async def _try_to_move(self) -> tuple[str, str] | None:
        alive, running = self._alive(), self._running()
        name = self._rng.choice(running) if running else None
        source = await self._fleet.place(name) if name else None
        others = sorted(set(alive) - {source})
        if name is None or source not in alive or not others:
            await asyncio.sleep(PAUSE_S)
            return None
        destination = self._rng.choice(others)
        move = asyncio.create_task(self._move(name, destination))
        self._moves.add(move)
        move.add_done_callback(self._moves.discard)
        while not move.done():
            if is_moving(await self._fleet.overview(), source, destination):
                return source, destination
        return None

    async def _move(self, name: str, destination: str | None = None) -> None:
        """If it can be: it may have ended."""
        with suppress(ServerFailed):
            await self._fleet.migrate(name, destination)

    def _running(self) -> list[str]:
        """Streams that some instance has."""
        return sorted(stream.name for stream in self._crowd.open if stream.arrivals)


def _send(process: psutil.Process, what: signal.Signals) -> None:
    """Not to another process that got its pid: psutil looks at when it was started."""
    with suppress(psutil.NoSuchProcess):
        process.send_signal(what)
