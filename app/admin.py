"""The admin API under /fleet (design.md §5): what runs where, and moving it by hand."""

import asyncio
import math
import secrets
import time
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Header, HTTPException
from pydantic import BaseModel, ConfigDict
from ray.serve.handle import DeploymentHandle

from app.fleet_client import FleetClient
from app.peers import Peers, Shown, shown_by
from deployments.messages import FleetView
from deployments.pinned import ask, call, pinned
from deployments.policy.load import InstanceLoad
from migration.snapshot import CannotMove, MigrationRecord

CALL_TIMEOUT_S = 2.0
MIGRATE_TIMEOUT_S = 60.0


def refusal(status: int, message: str) -> HTTPException:
    """An answer other than 200; vLLM's server gives it OpenAI's form."""
    return HTTPException(status, message)


class Migrate(BaseModel):
    """Body of POST /fleet/migrate; without a destination the freest other instance is taken."""

    model_config = ConfigDict(extra="forbid")
    request_id: str
    destination: str | None = None


class Drain(BaseModel):
    """Body of POST /fleet/drain and /fleet/undrain."""

    model_config = ConfigDict(extra="forbid")
    replica_id: str


class Fleet:
    """What the routes do.

    Over gRPC whatever goes wrong in a replica, a dead engine's error too, arrives as it was raised:
    hence no list of exceptions. To the user it is one that does not answer.
    """

    def __init__(
        self,
        client: FleetClient,
        peers: Peers,
        replicas: DeploymentHandle,
        scheduler: DeploymentHandle,
    ) -> None:
        self._client = client
        self._peers = peers
        self._replicas = replicas
        self._scheduler = scheduler.options(_by_reference=False)
        self._known: dict[str, InstanceLoad] = {}

    async def overview(self) -> dict[str, Any]:
        """All instances. Without the Scheduler they are asked one by one."""
        view, elsewhere = await asyncio.gather(self._view(), self._peers.recoveries())
        loads = view.loads if view else await self._ask_each()
        migrations = view.migrations if view else {}
        return {
            "replicas": [load_to_json(load) for load in loads],
            "scheduler": "up" if view else "bypassed",
            "migrations": {
                kind: migrations.get(kind, 0) for kind in ("completed", "aborted", "refused")
            },
            "recoveries": self._client.recoveries + elsewhere,
        }

    async def find(self, name: str) -> Shown:
        """The request, whichever ingress has it, or 404. A running one wins over one that ended."""
        known = shown_by(self._client.journal, name)
        if not known or known[0].ended:
            known += await self._peers.shown(name)
        if not known:
            raise refusal(404, f"no request {name!r} is running or ended lately")
        return min(known, key=lambda each: each.ended)

    async def requests(self) -> list[dict[str, Any]]:
        """Of all ingresses: running requests, then the last that ended at each, newest first."""
        known = shown_by(self._client.journal) + await self._peers.shown()
        return [each.json for each in sorted(known, key=lambda each: each.ended)]

    async def migrate(self, order: Migrate) -> MigrationRecord:
        """Move one request now."""
        request = await self.find(order.request_id)
        if request.ended:
            raise refusal(409, f"request {order.request_id!r} has ended ({request.json['state']})")
        if request.replica is None:
            raise refusal(409, f"request {order.request_id!r} is not on a replica yet")
        source = request.replica
        destination = order.destination or await self._freest_but(source, request.fingerprint)
        await self._require(destination)
        try:
            async with asyncio.timeout(MIGRATE_TIMEOUT_S):
                replica = pinned(self._replicas, source)
                record: MigrationRecord = await ask(
                    replica, "migrate_out", request.request_id, destination
                )
        except CannotMove as error:
            raise refusal(409, str(error)) from None
        except Exception:
            raise refusal(409, f"{source} does not answer") from None
        if record.outcome != "completed":
            raise refusal(409, record.detail)
        return msgspec.structs.replace(record, at=time.time())

    async def drain(self, replica_id: str, draining: bool) -> None:
        """Evacuate an instance, or take it back."""
        await self._require(replica_id)
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                await ask(pinned(self._replicas, replica_id), "set_draining", draining)
        except CannotMove as error:
            raise refusal(409, str(error)) from None
        except Exception:
            raise refusal(404, f"replica {replica_id!r} does not answer") from None

    async def _require(self, replica_id: str) -> None:
        """404 unless there is such a replica."""
        if replica_id not in self._known and not await self._view():
            return  # nobody to ask: the call itself will tell
        if replica_id not in self._known:
            raise refusal(404, f"no replica {replica_id!r}")

    async def _freest_but(self, source: str, fingerprint: str) -> str:
        view = await self._view()
        loads = view.loads if view else await self._ask_each()
        others = [x for x in loads if x.replica_id != source and x.fingerprint == fingerprint]
        takers = [x for x in others if x.state == "running"]
        if not takers:
            raise refusal(409, "no other replica takes requests")
        return max(takers, key=lambda load: load.freeness).replica_id

    async def _view(self) -> FleetView | None:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                view: FleetView = await call(self._scheduler, "view")
        except Exception:
            return None
        self._known = {load.replica_id: load for load in view.loads}
        return view

    async def _ask_each(self) -> tuple[InstanceLoad, ...]:
        answers = await asyncio.gather(
            *(self._ask(replica_id) for replica_id in self._known), return_exceptions=False
        )
        return tuple(load for load in answers if load is not None)

    async def _ask(self, replica_id: str) -> InstanceLoad | None:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                load: InstanceLoad = await call(pinned(self._replicas, replica_id), "load")
                return load
        except Exception:
            return None


def load_to_json(load: InstanceLoad) -> dict[str, Any]:
    """The admin API's form; a draining instance's freeness is -inf, which JSON does not have."""
    return {
        "replica_id": load.replica_id,
        "state": load.state,
        "freeness": round(load.freeness, 3) if math.isfinite(load.freeness) else None,
        "blocks_total": load.blocks_total,
        "blocks_used": load.blocks_used,
        "head_of_line_blocks": load.head_of_line_blocks,
        "due_blocks": load.due_blocks,
        "headroom_blocks": dict(load.headroom_blocks),
        "running": load.running,
        "waiting": load.waiting,
        "migrating_in": load.migrating_in,
        "migrating_out": load.migrating_out,
        "emulation_drift": round(load.emulation_drift, 6),
        "fingerprint": load.fingerprint,
    }


def admin_router(
    client: FleetClient,
    peers: Peers,
    replicas: DeploymentHandle,
    scheduler: DeploymentHandle,
    api_key: str | None,
) -> APIRouter:
    """The routes; each asks for the bearer key if one is set."""
    fleet = Fleet(client, peers, replicas, scheduler)

    def authorize(authorization: Annotated[str | None, Header()] = None) -> None:
        sent = (authorization or "").removeprefix("Bearer ")
        if api_key is not None and not secrets.compare_digest(sent.encode(), api_key.encode()):
            key = "`Authorization: Bearer <key>` (admin.api_key, or VLLM_API_KEY)"
            raise refusal(401, f"the admin API needs {key}")

    router = APIRouter(prefix="/fleet", dependencies=[Depends(authorize)])

    @router.get("")
    async def overview() -> dict[str, Any]:
        return await fleet.overview()

    @router.get("/requests")
    async def requests() -> list[dict[str, Any]]:
        return await fleet.requests()

    @router.get("/requests/{request_id}")
    async def request(request_id: str) -> dict[str, Any]:
        return (await fleet.find(request_id)).json

    @router.post("/migrate")
    async def migrate(order: Migrate) -> dict[str, Any]:
        return (await fleet.migrate(order)).to_json()

    @router.post("/drain")
    async def drain(order: Drain) -> dict[str, Any]:
        await fleet.drain(order.replica_id, True)
        return {"replica_id": order.replica_id, "state": "draining"}

    @router.post("/undrain")
    async def undrain(order: Drain) -> dict[str, Any]:
        await fleet.drain(order.replica_id, False)
        return {"replica_id": order.replica_id, "state": "running"}

    return router
