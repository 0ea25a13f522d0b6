"""Asking the Scheduler, without ever waiting for it long: batches, a timeout and a breaker."""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Sequence

from ray.serve.handle import DeploymentHandle

from deployments.breaker import Breaker
from deployments.messages import SCHEDULER, Ask, Decision
from deployments.pinned import call
from deployments.policy.last_loads import LastLoads

CONSULT_TIMEOUT_S = 0.1
MAX_BATCH = 64

logger = logging.getLogger("ray.serve.llumnix")


class NoInstance(Exception):
    """No instance takes a new request; the message says why."""


class Consult:
    """Chooses instances for new requests, on the routers' event loop.

    All requests that wait are asked for in one call, one call at a time: a consult each would halve
    the throughput (serve.md, 1.6). Of a Scheduler that dies nobody knows until a call times out:
    requests that come before then wait for it, none does afterwards.
    """

    def __init__(self, app_name: str, policy: str) -> None:
        self._app_name = app_name
        self._handle: DeploymentHandle | None = None
        self._waiting: deque[tuple[Ask, asyncio.Future[str | None]]] = deque()
        self._asking: asyncio.Task[None] | None = None
        self._probing: asyncio.Task[None] | None = None
        self._breaker = Breaker()
        self._last = LastLoads(policy, random.Random())

    async def choose(self, ask: Ask, candidates: Sequence[str]) -> str:
        """The replica id for this request, one of `candidates`. Raises NoInstance."""
        chosen = await self._ask(ask)
        if chosen is not None and chosen in candidates:
            return chosen
        if not self._breaker.closed:
            self._probe_if_due(candidates)
        elif chosen is None and not self._last.not_draining(candidates):
            raise NoInstance("all are draining")
        return self._last.choose(ask, candidates, _now())

    async def _ask(self, ask: Ask) -> str | None:
        """The Scheduler's word; None where it knows none, or is bypassed."""
        answer: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((ask, answer))
        if self._asking is None or self._asking.done():
            self._asking = asyncio.get_running_loop().create_task(self._ask_all())
        return await answer

    async def _ask_all(self) -> None:
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(MAX_BATCH, len(self._waiting)))]
            decision = await self._consult([ask for ask, _ in batch])
            chosen = decision.chosen if decision else (None,) * len(batch)
            for (_, answer), replica_id in zip(batch, chosen, strict=True):
                if not answer.done():
                    answer.set_result(replica_id)

    async def _consult(self, asks: list[Ask]) -> Decision | None:
        if not self._breaker.closed:
            return None
        decision = await self._call(asks)
        if decision:
            self._last.see(decision.loads, _now())
        return decision

    def _probe_if_due(self, candidates: Sequence[str]) -> None:
        """In the background, and only where there are requests: an idle router asks nobody."""
        idle = self._probing is None or self._probing.done()
        if idle and self._breaker.wants_probe(_now()):
            self._probing = asyncio.get_running_loop().create_task(self._probe(candidates))

    async def _probe(self, candidates: Sequence[str]) -> None:
        """Ask for no request, for which the answer tells all loads."""
        decision = await self._call([])
        if decision is None:
            return
        known = {load.replica_id for load in decision.loads}
        self._breaker.answered(known.issuperset(candidates), _now())
        if self._breaker.closed:
            self._last.see(decision.loads, _now())
            logger.info("scheduler is asked again")

    async def _call(self, asks: list[Ask]) -> Decision | None:
        """None where the Scheduler fails, or is late: then it is bypassed."""
        try:
            async with asyncio.timeout(CONSULT_TIMEOUT_S):
                decision: Decision = await call(self._scheduler(), "choose", asks)
        except Exception as error:  # whatever it is, requests do not wait for it
            if self._breaker.closed:
                logger.warning("scheduler bypassed: %s", type(error).__name__)
            self._breaker.failed(_now())
            return None
        return decision

    def _scheduler(self) -> DeploymentHandle:
        """Made at first use, with its router on this very loop: otherwise both would deadlock."""
        if self._handle is None:
            handle = DeploymentHandle(SCHEDULER, self._app_name)
            handle._init(_run_router_in_separate_loop=False)
            self._handle = handle.options(_by_reference=False)
        return self._handle


def _now() -> float:
    return asyncio.get_running_loop().time()
