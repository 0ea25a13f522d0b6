"""The replica's background task: report load, take orders, drop what nobody asks for."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from deployments.engine_loop import EngineDead
from deployments.llumlet import Llumlet
from deployments.messages import Orders, Report
from migration.source import Reason

BUSY_INTERVAL_S = 0.1
IDLE_INTERVAL_S = 1.0
"""An idle instance's load does not change by itself; the report only says that it is alive."""

COALESCE_S = 0.01
"""Changes this close together are told in one report."""

REPORT_TIMEOUT_S = 1.0
FAILED_PAUSE_S = 1.0

logger = logging.getLogger("ray.serve.llumnix")


class Reporter:
    """Reports on change, and at least every 100 ms while there is work. Orders are the answer.

    `send` takes a report to the scheduler; `observe` is told of each.
    """

    def __init__(
        self,
        llumlet: Llumlet,
        send: Callable[[Report], Awaitable[Orders]],
        observe: Callable[[Report], None],
        obeys: bool,
    ) -> None:
        self._llumlet = llumlet
        self._ask = send
        self._observe = observe
        self._obeys = obeys
        self._orders = Orders()
        self._up = True
        self._task: asyncio.Task[None] | None = None
        self._obeying: set[asyncio.Task[object]] = set()

    def start(self) -> None:
        """Begin; ends with the replica's event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while True:
            try:
                soon = await self._round()
            except EngineDead:
                return  # check_health tells Serve
            except Exception as error:  # the instance must not fall silent for ever
                logger.error("%s: reporting failed: %r", self._llumlet.replica_id, error)
                await asyncio.sleep(FAILED_PAUSE_S)
            else:
                await self._wait(soon)

    async def _round(self) -> bool:
        """One report and what follows from it. Whether the next is due soon.

        It is while there is work, and while the Scheduler does not answer: Serve holds calls back
        until there is one, which then hears at once of every instance that has a report waiting.
        """
        report = await self._llumlet.report()
        self._observe(report)
        if orders := await self._send(report):
            self._follow(orders)
        await self._llumlet.housekeeping()
        return bool(report.load.running or report.load.waiting or not self._up)

    async def _send(self, report: Report) -> Orders | None:
        try:
            async with asyncio.timeout(REPORT_TIMEOUT_S):
                orders = await self._ask(report)
        except (TimeoutError, RayError, RayServeException):
            if self._up:
                logger.warning("scheduler does not answer %s", self._llumlet.replica_id)
            self._up = False
            return None
        if not self._up:
            logger.info("scheduler answers %s again", self._llumlet.replica_id)
        self._up = True
        return orders

    def _follow(self, orders: Orders) -> None:
        """At most one move at a time is made on orders; a draining instance uses all its slots."""
        self._orders = orders
        if not self._obeys or not orders.targets:
            return
        slots = self._llumlet.slots if self._llumlet.draining else 1
        for _ in range(slots - len(self._obeying)):
            obeying = asyncio.get_running_loop().create_task(self._obey())
            self._obeying.add(obeying)
            obeying.add_done_callback(self._obeying.discard)

    async def _obey(self) -> None:
        """Make a move; while draining the next one as well, for which no report is waited for."""
        going_on = True
        while going_on:
            reason: Reason = "drain" if self._llumlet.draining else "balance"
            try:
                record = await self._llumlet.obey(self._orders, reason)
            except EngineDead:
                return  # check_health tells Serve
            moved = record is not None and record.outcome == "completed"
            going_on = moved and self._llumlet.draining

    async def _wait(self, soon: bool) -> None:
        changed = self._llumlet.changed
        try:
            async with asyncio.timeout(BUSY_INTERVAL_S if soon else IDLE_INTERVAL_S):
                await changed.wait()
            await asyncio.sleep(COALESCE_S)
        except TimeoutError:
            pass
        changed.clear()
