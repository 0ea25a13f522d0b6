"""Asking the Scheduler, without ever waiting for it long: batches, a timeout and a breaker."""

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Sequence

from ray.serve.handle import DeploymentHandle

from deployments.messages import SCHEDULER, Ask, Decision
from deployments.pinned import call
from deployments.policy import dispatch
from deployments.policy.load import InstanceLoad

CONSULT_TIMEOUT_S = 0.1
BREAKER_S = 1.0
"""After a consult that failed, requests are routed without one for this long."""

MAX_BATCH = 64

logger = logging.getLogger("ray.serve.llumnix")


class NoInstance(Exception):
    """No instance takes a new request; the message says why."""


class Consult:
    """Chooses instances for new requests, on the routers' event loop.

    All requests that wait are asked for in one call, one call at a time: a consult each would halve
    the throughput (serve.md, 1.6).
    """

    def __init__(self, app_name: str, policy: str) -> None:
        self._app_name = app_name
        self._policy = policy
        self._handle: DeploymentHandle | None = None
        self._waiting: deque[tuple[Ask, asyncio.Future[str | None]]] = deque()
        self._asking: asyncio.Task[None] | None = None
        self._broken_until = 0.0
        self._loads: tuple[InstanceLoad, ...] = ()
        self._turn = 0
        self._rng = random.Random()

    async def choose(self, ask: Ask, candidates: Sequence[str]) -> str:
        """The replica id for this request, one of `candidates`. Raises NoInstance."""
        if time.monotonic() >= self._broken_until:
            chosen = await self._ask(ask)
            if chosen is not None and chosen in candidates:
                return chosen
            if chosen is None and not self._not_draining(candidates):
                raise NoInstance("all are draining")
        return self._alone(ask, candidates)

    async def _ask(self, ask: Ask) -> str | None:
        answer: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((ask, answer))
        if self._asking is None or self._asking.done():
            self._asking = asyncio.get_running_loop().create_task(self._ask_all())
        return await answer

    async def _ask_all(self) -> None:
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(MAX_BATCH, len(self._waiting)))]
            decision = await self._decide([ask for ask, _ in batch])
            chosen = decision.chosen if decision else (None,) * len(batch)
            for (_, answer), replica_id in zip(batch, chosen, strict=True):
                if not answer.done():
                    answer.set_result(replica_id)

    async def _decide(self, asks: list[Ask]) -> Decision | None:
        if time.monotonic() < self._broken_until:
            return None
        try:
            async with asyncio.timeout(CONSULT_TIMEOUT_S):
                decision: Decision = await call(self._scheduler(), "choose", asks)
        except Exception as error:  # whatever it is, requests do not wait for it
            self._broken_until = time.monotonic() + BREAKER_S
            # Those that were draining may take requests again, and nobody would say so.
            self._loads = tuple(load for load in self._loads if load.state != "draining")
            logger.warning("scheduler bypassed for %.0f s: %s", BREAKER_S, type(error).__name__)
            return None
        self._loads = decision.loads
        return decision

    def _not_draining(self, candidates: Sequence[str]) -> list[str]:
        draining = {load.replica_id for load in self._loads if load.state == "draining"}
        return [candidate for candidate in candidates if candidate not in draining]

    def _alone(self, ask: Ask, candidates: Sequence[str]) -> str:
        """Decide from the last loads seen, or in turn where none are known."""
        self._turn += 1
        candidates = self._not_draining(candidates) or candidates
        known = [load for load in self._loads if load.replica_id in candidates]
        keeps_headroom = ask.headroom_tokens > 0
        best = dispatch.choose(self._policy, known, self._rng, self._turn, keeps_headroom)
        return best.replica_id if best else candidates[self._turn % len(candidates)]

    def _scheduler(self) -> DeploymentHandle:
        """Made at first use, with its router on this very loop: otherwise both would deadlock."""
        if self._handle is None:
            handle = DeploymentHandle(SCHEDULER, self._app_name)
            handle._init(_run_router_in_separate_loop=False)
            self._handle = handle.options(_by_reference=False)
        return self._handle
