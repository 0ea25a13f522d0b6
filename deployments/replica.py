"""LLMReplica: one instance of the fleet as Serve, the ingress and the other replicas call it."""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from ray import serve
from ray.serve.handle import DeploymentHandle

from app.config import FleetConfig
from deployments import serve_stop
from deployments.messages import REPLICA, SCHEDULER, Hello, Report, Route
from deployments.pinned import answers_refusals, call
from deployments.policy.load import InstanceLoad
from deployments.policy.scaling import Demand
from migration.ownership import Outcome
from migration.protocol.messages import Commit, Extend, Refused, Reserve, Reserved, Stage
from migration.snapshot import MigrationRecord, Submission

if TYPE_CHECKING:
    from migration.source import Reason


class LLMReplica:
    """Ordinary Serve methods. All but `hello` and `submit` make sense only when pinned."""

    def __init__(self, config: FleetConfig, worker_extension: str | None) -> None:
        # Only here, because importing vLLM takes ten seconds: the controller and the process that
        # builds the application import this module too.
        from deployments.instance import Instance

        context = serve.get_replica_context()
        replica_id = context.replica_id.unique_id
        scheduler = DeploymentHandle(SCHEDULER, context.app_name).options(_by_reference=False)
        call(scheduler, "report", Report(InstanceLoad(replica_id, "starting")))  # nobody waits
        peers = DeploymentHandle(REPLICA, context.app_name)
        self._instance = Instance(replica_id, config, worker_extension, peers, scheduler)
        self._llumlet = self._instance.llumlet
        self._incoming = self._instance.incoming
        # Ends with the replica's event loop.
        watch = serve_stop.watch(self._llumlet.retire)
        self._stop_watch = asyncio.get_running_loop().create_task(watch)

    # --- the ingress ---

    async def hello(self) -> Hello:
        """What a front end needs to know of the engine."""
        return self._instance.hello

    async def submit(self, submission: Submission, _: Route, tokens: Sequence[int]) -> Outcome:
        """Run a request, from its output `tokens` on if it has some: its instance was lost.

        Stays open until the request leaves this replica, and says how. The Route is for the router.
        """
        return await self._llumlet.submit(submission, tokens)

    async def attach(self, request_id: str) -> Outcome:
        """Like `submit`, for a request that moved here."""
        return await self._llumlet.attach(request_id)

    async def abort(self, request_id: str, forwarded: bool = False) -> None:
        """Drop a request whose client is gone, or that goes on elsewhere."""
        await self._llumlet.abort(request_id, forwarded)

    async def pulse(self) -> float:
        """That this process lives; the answer is how many seconds the present step has taken."""
        return self._instance.stuck_for()

    # --- the admin API ---

    async def load(self) -> InstanceLoad:
        """The present load."""
        return await self._llumlet.load()

    @answers_refusals
    async def set_draining(self, draining: bool) -> None:
        """Evacuate this instance by migration, or take requests again.

        Answers CannotMove where Serve stops it.
        """
        self._llumlet.drain(draining)

    @answers_refusals
    async def migrate_out(
        self, request_id: str, destination: str, reason: "Reason" = "admin"
    ) -> MigrationRecord:
        """Move a request from here to another replica; the record says how it went.

        Answers CannotMove where it is not even tried.
        """
        return await self._llumlet.migrate_out(request_id, destination, reason)

    # --- migration, as the destination ---

    @answers_refusals
    async def connect(self, group: str) -> None:
        """Join a pair group as the receiving end."""
        await self._instance.links.join(group)

    async def reserve(self, message: Reserve) -> Reserved | Refused:
        """PRE-ALLOC of the first stage: hold blocks for a request."""
        return await self._llumlet.reserve(message)

    @answers_refusals
    async def extend(self, message: Extend) -> Reserved | Refused:
        """PRE-ALLOC of a later stage: hold more."""
        return await self._incoming.extend(message)

    @answers_refusals
    async def receive(self, message: Stage) -> int:
        """Take the KV blocks of a stage over the pair group."""
        return await self._incoming.receive(message)

    @answers_refusals
    async def commit(self, message: Commit) -> None:
        """Become the owner of the request, once its last blocks are here."""
        await self._incoming.commit(message)

    async def cancel(self, migration_id: str) -> bool:
        """Give up a migration; False if it has committed."""
        return await self._incoming.cancel(migration_id)

    # --- Serve ---

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve passes on to our autoscaling policy: a Demand."""
        return asdict(Demand.of(await self._llumlet.load()))

    def record_replica_metadata(self) -> dict[str, str]:
        """What Serve hands on to the routers: which requests can run here."""
        return {"fingerprint": self._instance.hello.fingerprint}

    def check_health(self) -> None:
        """Raise where the engine is dead or hangs: Serve then replaces this replica."""
        self._instance.check_health()
