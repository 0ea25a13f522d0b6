"""Peers: the other ingresses, asked for what they know of the fleet's requests.

The seam to Serve's `broadcast` (alpha). Its `results_async` gives all answers or none, so one
ingress that hangs would cost the others' answers; here each of its calls is awaited by itself.
"""

import asyncio
import contextvars
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

if TYPE_CHECKING:
    from app.entry import Entry  # only then: it imports vLLM
    from app.journal import Journal

ANSWER_S = 2.0
"""An ingress that has not answered by then is dead or hangs: we do without it."""

logger = logging.getLogger("ray.serve.llumnix")


@dataclass(frozen=True, slots=True)
class Shown:
    """A request, as the ingress that serves it tells of it.

    `request_id` is the one inside the engines; `replica`: the last that had it. `json`: the admin
    API's form.
    """

    request_id: str
    fingerprint: str
    replica: str | None
    ended: bool
    json: dict[str, Any]


def shown_by(journal: "Journal", name: str | None = None) -> list[Shown]:
    """The running requests of an ingress, then the last that ended; or the one with this name."""
    if name is None:
        return [_shown(entry) for entry in journal.shown()]
    entry = journal.find(name)
    return [] if entry is None else [_shown(entry)]


def _shown(entry: "Entry") -> Shown:
    return Shown(
        entry.submission.request_id,
        entry.submission.fingerprint,
        entry.place if entry.unplaced_since is None else None,
        entry.ended,
        entry.to_json(),
    )


class Peers:
    """The ingresses that Serve runs, but this one; those that do not answer are left out.

    One that Serve stops, while its last streams end, is not among them.
    """

    def __init__(self, ingresses: DeploymentHandle, own_id: str) -> None:
        self._ingresses = ingresses.options(_by_reference=False)
        self._own_id = own_id

    async def shown(self, name: str | None = None) -> list[Shown]:
        """Their requests, or those with this name."""
        return [each for answer in await self._ask("shown", name) for each in answer]

    async def recoveries(self) -> int:
        """How many requests they have continued after a loss."""
        return sum(await self._ask("recoveries"))

    async def _ask(self, method: str, *args: Any) -> list[Any]:
        """The answers that came in time; this ingress, asked as well, has none for itself."""
        asking = self._broadcast(method, self._own_id, *args)
        # Outside of the present request's context, as `pinned.call`.
        return await asyncio.create_task(asking, context=contextvars.Context())

    async def _broadcast(self, method: str, *args: Any) -> list[Any]:
        deadline = asyncio.get_running_loop().time() + ANSWER_S
        try:
            async with asyncio.timeout_at(deadline):
                response = self._ingresses.broadcast(method, *args)
                calls = await response._fetch_replica_results_async()
        except (RayError, RayServeException, TimeoutError) as error:
            logger.warning("the other ingresses cannot be asked (%s)", type(error).__name__)
            return []
        answers = await asyncio.gather(*(_answer(call, deadline) for call in calls))
        return [answer for answer in answers if answer is not None]


async def _answer(call: Any, deadline: float) -> Any:
    try:
        async with asyncio.timeout_at(deadline):
            return await call.get_async()
    except Exception as error:  # over gRPC whatever goes wrong there arrives as it was raised
        logger.warning("an ingress does not answer (%s)", type(error).__name__)
        return None
