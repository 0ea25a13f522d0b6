"""The step thread of one simulated engine: it batches, preempts, and runs commands between steps.

Plays EngineLoop and vLLM's scheduler, in virtual time.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from deployments.engine_loop import EngineDead
from migration.engine_seam import Reservation
from migration.snapshot import Submission
from tests.migration.sim.kv import BLOCK, Pool, is_last, kv_of, token_after

T = TypeVar("T")

CHUNK = 8
"""Tokens of one request that a step computes at most."""
MAX_BATCH = 4


@dataclass(slots=True, eq=False)
class SimRequest:
    """A request inside an engine; `tokens` and `computed` count what is in flight."""

    request_id: str
    submission: Submission
    tokens: list[int]
    told: int = 0
    computed: int = 0
    in_flight: int = 0
    preemptions: int = 0
    life: int = 0
    blocks: list[int] = field(default_factory=list)
    grammar: Future[Any] | None = None

    @property
    def prompt(self) -> int:
        return self.submission.prompt_tokens

    @property
    def outputs(self) -> list[int]:
        return self.tokens[self.prompt : self.prompt + self.told]

    @property
    def ends(self) -> bool:
        return is_last(self.tokens[self.prompt :], self.submission.request[0])


Flight = list[tuple[SimRequest, int, int, bool]]
"""What a step computes: request, its life, tokens computed, whether one was sampled."""


class Watcher:
    """What an engine tells the world. Nothing, here."""

    def boundary(self) -> None:
        """A step boundary, before the commands."""

    def happened(self, what: str) -> None:
        """`parked` or `installed`."""

    def broken(self, what: str) -> None:
        """Something that must never happen did."""

    def owned(self, engine: "SimSteps", request_id: str) -> None:
        """This engine emits the request's tokens from now on."""

    def emitted(
        self, engine: "SimSteps", request_id: str, first: int, token: int, last: bool
    ) -> None:
        """A token, with its index in the output."""


class SimSteps:
    """An engine without its seam. `depth` 2 is vLLM's async scheduling."""

    def __init__(
        self, name: str, blocks: int, step_s: float, depth: int, answer_s: float, watcher: Watcher
    ) -> None:
        self.name = name
        self.pool = Pool(blocks)
        self.blocks_total = blocks
        self.requests: dict[str, SimRequest] = {}
        self.running: list[SimRequest] = []
        self.waiting: deque[SimRequest] = deque()
        self.parked: dict[str, float] = {}
        self.reserved: list[Reservation] = []
        self.done: set[str] = set()
        self.installed: list[str] = []
        self.dead = False
        self.grammar_s = 0.0
        self.longest_stop = 0.0
        self.workers: Callable[..., list[Any]]
        self._step_s = step_s
        self._depth = depth
        self._answer_s = answer_s
        self._watcher = watcher
        self._flights: deque[Flight] = deque()
        self._left: set[str] = set()
        self._preempted = False
        self._commands: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._wake = asyncio.Event()
        self._hung_until = 0.0
        self._loop = asyncio.get_running_loop()

    # --- the step thread ---

    async def run(self, command: Callable[[], T]) -> T:
        """Before the next step; a caller that hangs up earlier takes its command back."""
        return await self.command(command)

    def command(self, command: Callable[[], T]) -> "asyncio.Future[T]":
        """Before the next step, or at once if there is nothing to step."""
        if self.dead:
            raise EngineDead("it died")
        future: asyncio.Future[T] = self._loop.create_future()
        self._commands.append((command, future))
        self._wake.set()
        return future

    def hang(self, seconds: float) -> None:
        """The present step takes that much longer."""
        self._hung_until = max(self._hung_until, self._loop.time() + seconds)

    async def steps(self) -> None:
        """Step for ever."""
        while True:
            while (left := self._hung_until - self._loop.time()) > 0:
                await asyncio.sleep(left)
            self._watcher.boundary()
            self._run_commands()
            if self.requests.keys() - self.parked.keys() or self._left or self._flights:
                self._flights.append(self._begin())
                await asyncio.sleep(self._step_s)
                if len(self._flights) == self._depth or not self._flights[-1]:
                    self._land(self._flights.popleft())
            else:
                self._wake.clear()
                await self._wake.wait()

    def _run_commands(self) -> None:
        while self._commands:
            command, future = self._commands.popleft()
            if future.cancelled():
                continue
            try:
                result, error = command(), None
            except Exception as raised:
                result, error = None, raised
            # The loop hears of it later: its caller may have hung up, and the command was run.
            self._loop.call_later(self._answer_s, _answer, future, result, error)

    def _begin(self) -> Flight:
        self._left.clear()
        self._preempted = False
        flight: Flight = []
        for request in list(self.running):
            if request in self.running and not request.ends:
                self._compute(request, flight)
        while self.waiting and len(self.running) < MAX_BATCH and not self._preempted:
            holding = (request for request in self.waiting if request.blocks)
            if not self._admit(next(holding, self.waiting[0]), flight):
                break
        return flight

    def _admit(self, request: SimRequest, flight: Flight) -> bool:
        fresh = not request.blocks
        if fresh:
            request.blocks = self.pool.prefix(request.tokens, (len(request.tokens) - 1) // BLOCK)
            request.computed = len(request.blocks) * BLOCK
        if self._missing(request) > len(self.pool.free):
            if fresh:
                self.pool.give_back(request.blocks)
                request.blocks, request.computed = [], 0
            self._make_way()
            return False
        self.waiting.remove(request)
        self.running.append(request)
        if not request.ends:
            self._compute(request, flight)
        return True

    def _missing(self, request: SimRequest) -> int:
        upto = min(len(request.tokens), request.computed + CHUNK)
        return self.blocks_for(upto) - len(request.blocks)

    def _make_way(self) -> None:
        """Nothing runs that would end: of those that wait, the last gives its blocks up."""
        holders = [other for other in self.waiting if other.blocks]
        if holders and not self.running:
            self._lose(holders[-1])

    def _compute(self, request: SimRequest, flight: Flight) -> None:
        while self._missing(request) > len(self.pool.free):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return
        while self._missing(request) > 0:
            request.blocks.append(self.pool.take())
        upto = min(len(request.tokens), request.computed + CHUNK)
        count = upto - request.computed
        self._write(request, upto)
        sampled = upto == len(request.tokens)
        if sampled:
            request.tokens.append(token_after(self._read(request)))
        request.in_flight += count
        flight.append((request, request.life, count, sampled))

    def _write(self, request: SimRequest, upto: int) -> None:
        kv = self._read(request)
        before = kv[-1] if kv else 0
        for at in range(request.computed, upto):
            before = kv_of(before, request.tokens[at])
            self.pool.contents[request.blocks[at // BLOCK]][at % BLOCK] = before
        request.computed = upto
        self.pool.remember(request.tokens, request.blocks, upto)

    def _read(self, request: SimRequest) -> list[int]:
        found = [kv for block in request.blocks for kv in self.pool.contents[block]]
        return found[: request.computed]

    def _preempt(self, request: SimRequest) -> None:
        self._preempted = True
        self.running.remove(request)
        self._lose(request)
        self.waiting.appendleft(request)

    def _lose(self, request: SimRequest) -> None:
        self.pool.give_back(request.blocks)
        del request.tokens[request.prompt + request.told :]
        request.blocks, request.computed, request.in_flight = [], 0, 0
        request.preemptions += 1
        request.life += 1

    def _land(self, flight: Flight) -> None:
        for request, life, count, sampled in flight:
            if self.requests.get(request.request_id) is not request or request.life != life:
                continue
            request.in_flight -= count
            if not sampled:
                continue
            request.told += 1
            last = is_last(request.outputs, request.submission.request[0])
            if last:
                self._free(request)
                self.done.add(request.request_id)
            told = request.told - 1
            self._watcher.emitted(self, request.request_id, told, request.outputs[-1], last)

    def _dequeue(self, request: SimRequest) -> None:
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def _free(self, request: SimRequest) -> None:
        self._dequeue(request)
        self.pool.give_back(request.blocks)
        request.blocks = []
        del self.requests[request.request_id]
        self._left.add(request.request_id)
        if request.request_id in self.parked:
            self._count_stop(request.request_id)

    def _count_stop(self, request_id: str) -> None:
        stop = self._loop.time() - self.parked.pop(request_id)
        self.longest_stop = max(self.longest_stop, stop)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // BLOCK)


def _answer(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
