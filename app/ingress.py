"""Ingress: what clients talk to."""

import logging
from typing import Any

from ray.serve.handle import DeploymentHandle

from app.config import FleetConfig
from deployments.pinned import call

logger = logging.getLogger("ray.serve.llumnix")


class Ingress:
    """Its HTTP app is built late: it needs a VllmConfig, which only a machine with the accelerator
    can make, so it asks the first instance that is up."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: FleetConfig, replicas: DeploymentHandle, scheduler: DeploymentHandle
    ) -> None:
        # Imported while the instances load their model; see LLMReplica for why only here.
        from app import front_end

        hello = await call(replicas.options(_by_reference=False), "hello")
        self._asgi, self._llm = await front_end.build(config, hello, replicas, scheduler)
        logger.info("ingress up")

    def __serve_build_asgi_app__(self) -> Any:
        return self._asgi

    async def check_health(self) -> None:
        """Raise where no request can be answered any more."""
        await self._llm.check_health()
