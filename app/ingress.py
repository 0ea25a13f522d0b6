"""Ingress: what clients talk to."""

import asyncio
import logging
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from app.config import FleetConfig
from app.peers import Peers, Shown, shown_by
from deployments.messages import Hello
from deployments.pinned import call

HELLO_PAUSE_S = 1.0
"""Between two questions, while only instances of the configuration before are up."""

logger = logging.getLogger("ray.serve.llumnix")


class Ingress:
    """Its HTTP app is built late: it needs a VllmConfig, which only a machine with the accelerator
    can make, so it asks an instance that is up. In an update the first ones may be the old ones.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: FleetConfig, replicas: DeploymentHandle, scheduler: DeploymentHandle
    ) -> None:
        # Imported while the instances load their model; see LLMReplica for why only here.
        from app import front_end
        from deployments import engine_config

        wanted = engine_config.fingerprint(config.model, config.engine)
        while (hello := await _hello(replicas)).fingerprint != wanted:
            logger.info(
                "waiting for an instance of configuration %s: %s", wanted, hello.fingerprint
            )
            await asyncio.sleep(HELLO_PAUSE_S)
        context = serve.get_replica_context()
        self._id = context.replica_id.unique_id
        peers = Peers(DeploymentHandle(context.deployment, context.app_name), self._id)
        self._asgi, self._llm, self._client = await front_end.build(
            config, hello, replicas, scheduler, peers
        )
        logger.info("ingress up")

    def __serve_build_asgi_app__(self) -> Any:
        return self._asgi

    async def shown(self, asker: str, name: str | None = None) -> list[Shown]:
        """For another ingress: the requests here, or the one with this name. None for itself."""
        return [] if asker == self._id else shown_by(self._client.journal, name)

    async def recoveries(self, asker: str) -> int:
        """For another ingress: how many requests were continued from here. 0 for itself."""
        return 0 if asker == self._id else self._client.recoveries

    async def check_health(self) -> None:
        """Raise where no request can be answered any more."""
        await self._llm.check_health()


async def _hello(replicas: DeploymentHandle) -> Hello:
    """Of any instance that is up; waits for the first."""
    hello: Hello = await call(replicas.options(_by_reference=False), "hello")
    return hello
