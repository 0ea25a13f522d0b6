"""The front end: vLLM's OpenAI server and the admin API over a FleetClient; no engine."""

import pickle
from functools import partial

import ray
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp
from vllm import envs
from vllm.config import VllmConfig
from vllm.v1.engine.async_llm import AsyncLLM

from app.admin import admin_router
from app.config import FleetConfig
from app.fleet_client import FleetClient
from app.gate import Gate
from app.openai_app import add_innermost, engine, openai_app
from app.peers import Peers
from app.priorities import Priorities
from app.refusals import RefusalMiddleware
from app.request_context import RequestContextMiddleware
from deployments.messages import Hello
from deployments.outbox import Inbox


async def build(
    config: FleetConfig,
    hello: Hello,
    replicas: DeploymentHandle,
    scheduler: DeploymentHandle,
    peers: Peers,
) -> tuple[ASGIApp, AsyncLLM, FleetClient]:
    """The ASGI app, the AsyncLLM under it, and its client, on the running event loop."""
    inbox = Inbox(ray.util.get_node_ip_address())
    priorities = Priorities(config.priorities)
    gate = Gate(config.priorities)
    client = FleetClient(replicas, inbox, hello, priorities, gate, config.recovery)
    llm = engine(_vllm_config(hello), client)
    client.endings.connect(partial(llm.abort, internal=True))
    app = await openai_app(config.model, priorities.api_keys, llm, hello.supported_tasks)
    if config.admin.enabled:
        key = config.admin.api_key or envs.VLLM_API_KEY or None
        app.include_router(admin_router(client, peers, replicas, scheduler, key))
    add_innermost(app, RefusalMiddleware)
    return RequestContextMiddleware(app, priorities), llm, client


def _vllm_config(hello: Hello) -> VllmConfig:
    """From this cluster's own replica, so unpickling is safe."""
    config: VllmConfig = pickle.loads(hello.vllm_config)
    config.model_config.max_model_len = hello.max_model_len
    config.cache_config.num_gpu_blocks = hello.num_gpu_blocks
    return config
