"""FleetRouter: routes new requests by the Scheduler's word, and pinned calls to their replica.

The seam to Serve's routing (ray.serve.request_router, alpha). One instance lives in each process
that holds a handle to LLMReplica, on a loop that all of the process' routers share.
"""

import random
import time
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from ray.util.metrics import Histogram

from deployments.consult import Consult, NoInstance
from deployments.messages import Ask, Route
from deployments.pinned import ReplicaGone
from migration.snapshot import Submission

SECONDS = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5]

LEFT_S = 600.0
"""A replica that left the routers' set is draining, or reconfiguring: it still takes pinned calls,
for as long as that may take.
"""


UNREACHABLE_S = 10.0
"""A replica that could not be reached is avoided; until then Serve has found out that it is dead.
Otherwise each retry, with a longer pause each time, might go to the next dead one: the freest.
"""


class FleetRouter(RequestRouter):
    """Pins are the handle's session id; see `pinned`."""

    def initialize_state(self, dispatch: str, headroom_tokens: dict[str, int]) -> None:
        """Called by Serve with `request_router_kwargs`. `headroom_tokens`: by priority class."""
        self._headroom_tokens = headroom_tokens
        self._consult = Consult(self.app_name, dispatch)
        self._left: dict[str, tuple[float, RunningReplica]] = {}
        self._unreachable: dict[str, float] = {}
        self._seconds = Histogram(
            "llumnix_dispatch_seconds", "Time to choose an instance for a request.", SECONDS
        )

    @property
    def max_num_routing_tasks(self) -> int:
        """Routing waits for the consult, not for the CPU: Serve's 2 per replica are too few."""
        return 512

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """One replica. Never none and never an exception: Serve would spin, or hang the call."""
        if pending_request is None:
            return [candidate_replicas[:1]]
        pending_request.routing_context.should_backoff = True
        if pin := pending_request.metadata.session_id:
            return [[self._pinned(pin, pending_request) or candidate_replicas[0]]]
        if not (pending_request.args and isinstance(pending_request.args[0], Submission)):
            return [[random.choice(candidate_replicas)]]
        try:
            return [[await self._dispatch(candidate_replicas, *pending_request.args)]]
        except NoInstance as error:
            self._fail(pending_request, error)
            return [candidate_replicas[:1]]

    async def _select_from_candidate_replicas(
        self, candidates: list[RunningReplica], backoff_index: int
    ) -> RunningReplica | None:
        """The choice is made: probing would cost a call and drop a draining replica."""
        return candidates[0]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Remember who left, for calls pinned to it."""
        now = time.monotonic()
        staying = {replica.replica_id for replica in replicas}
        for replica_id, replica in self.curr_replicas.items():
            if replica_id not in staying:
                self._left[replica_id.unique_id] = (now, replica)
        self._left = {k: v for k, v in self._left.items() if now - v[0] < LEFT_S}
        super().update_replicas(replicas)

    def on_replica_actor_died(self, replica_id: Any) -> None:
        """Pinned calls to a dead replica fail at once."""
        self._left.pop(replica_id.unique_id, None)
        super().on_replica_actor_died(replica_id)
        self._left.pop(replica_id.unique_id, None)

    def on_replica_actor_unavailable(self, replica_id: Any) -> None:
        """So a dead replica shows over gRPC."""
        now = time.time()
        known = {k: at for k, at in self._unreachable.items() if now - at < UNREACHABLE_S}
        self._unreachable = {**known, replica_id.unique_id: now}
        super().on_replica_actor_unavailable(replica_id)

    def _is_unreachable(self, replica_id: str) -> bool:
        return time.time() - self._unreachable.get(replica_id, 0.0) < UNREACHABLE_S

    def _pinned(self, pin: str, pending_request: PendingRequest) -> RunningReplica | None:
        if self._unreachable.get(pin, 0.0) >= pending_request.created_at:
            # Serve would try it again and again, without a pause.
            self._fail(pending_request, ReplicaGone(f"replica {pin} cannot be reached"))
            return None
        for replica_id, replica in self.curr_replicas.items():
            if replica_id.unique_id == pin:
                return replica
        if pin in self._left:
            return self._left[pin][1]
        self._fail(pending_request, ReplicaGone(f"replica {pin} is not there"))
        return None

    def _fail(self, pending_request: PendingRequest, error: Exception) -> None:
        """The caller gets this error; what is answered besides does not matter."""
        self._remove_pending_request_from_indices(pending_request)  # Serve keeps what has failed
        if not pending_request.future.done():
            pending_request.future.set_exception(error)

    async def _dispatch(
        self,
        candidates: list[RunningReplica],
        submission: Submission,
        route: Route,
        tokens: Sequence[int],
    ) -> RunningReplica:
        """By the Scheduler's word; the last arguments are those of `submit`. Raises NoInstance."""
        started = time.monotonic()
        fingerprint = submission.fingerprint
        by_id = {r.replica_id.unique_id: r for r in candidates if _runs(r, fingerprint)}
        if not by_id:
            raise NoInstance("none runs its model any more")
        ask = Ask(
            submission.request_id,
            submission.prompt_tokens + len(tokens),
            fingerprint,
            submission.priority_class,
            self._headroom_tokens.get(submission.priority_class, 0),
            route.avoid & by_id.keys() | set(filter(self._is_unreachable, by_id)),
        )
        route.chosen = await self._choose(ask, list(by_id))
        self._seconds.observe(time.monotonic() - started)
        return by_id[route.chosen]

    async def _choose(self, ask: Ask, candidates: list[str]) -> str:
        """One that may be back is better than none. Raises NoInstance."""
        well = [each for each in candidates if each not in ask.avoid]
        try:
            if well:
                return await self._consult.choose(ask, well)
        except NoInstance:
            if not ask.avoid:
                raise
        return random.choice(list(ask.avoid))


def _runs(replica: RunningReplica, fingerprint: str) -> bool:
    """False for another model or engine configuration: an update is under way."""
    return replica.replica_metadata.get("fingerprint") == fingerprint
