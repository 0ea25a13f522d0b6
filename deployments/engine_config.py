"""From the YAML's engine arguments to vLLM's configuration, and to a running EngineCore."""

import dataclasses
import hashlib
import json
import os
import pickle
from typing import Any

import msgspec
import vllm
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor import Executor

from app.config import EngineConfig, ModelConfig
from app.resources import executor
from deployments.emulated import worker as emulated
from deployments.emulated.profile import load_profile

ENVIRONMENT = {
    # The engine runs in the replica's process, where its scheduler can be reached between steps.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Several engines share a machine's cores: vLLM must not pin their threads to the same ones.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


VLLM_WORKER = "migration.worker.MigrationWorker"
EMULATED_WORKER = "deployments.emulated.worker.EmulatedMigration"


def build(
    model: ModelConfig, engine: EngineConfig, worker_extension: str | None = None
) -> VllmConfig:
    """vLLM's configuration of one instance. Raises what vLLM raises for wrong arguments.

    `worker_extension`: instead of the one that goes with the engine.
    """
    os.environ.update(ENVIRONMENT)
    extension = worker_extension or (EMULATED_WORKER if engine.emulated else VLLM_WORKER)
    args = AsyncEngineArgs(
        model=model.model_source,
        served_model_name=[model.model_id],
        worker_extension_cls=extension,
        **{
            "scheduling_policy": "priority",
            # With one, an ingress sends an image once, and only the engine that got it knows it.
            "mm_processor_cache_gb": 0,
            **_engine_defaults(engine),
            **engine_arguments(model),
            "distributed_executor_backend": executor(model),
        },
    )
    return args.create_engine_config(UsageContext.ENGINE_CONTEXT)


def _engine_defaults(engine: EngineConfig) -> dict[str, Any]:
    """What an emulated engine is made of; nothing for vLLM's own."""
    if engine.emulated is None:
        return {}
    profile = load_profile(engine.emulated.profile)
    return {
        **emulated.engine_arguments(profile),
        "worker_cls": emulated.WORKER,
        "additional_config": {emulated.PROFILE: msgspec.to_builtins(profile)},
    }


def engine_arguments(model: ModelConfig) -> dict[str, Any]:
    """The engine's own arguments; `engine_kwargs` may hold the OpenAI server's as well."""
    own = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    return {name: value for name, value in model.engine_kwargs.items() if name in own}


def fingerprint(model: ModelConfig, engine: EngineConfig) -> str:
    """Equal for instances between which a request can move: same tokens, same layout of the KV.

    The name that clients use, the policy and the number of instances do not count.
    """
    decisive = {
        "model": model.model_source,
        "arguments": engine_arguments(model),
        "engine": engine.model_dump(),
        "vllm": vllm.__version__.partition("+")[0],
    }
    text = json.dumps(decisive, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def freeze(config: VllmConfig) -> bytes:
    """Pickled for a front end elsewhere. Only before the EngineCore is made: see `Hello`."""
    return pickle.dumps(config)


def start(config: VllmConfig, transfers: int) -> EngineCore:
    """Load the model; ten seconds or more. `transfers`: most KV copies and joins at once."""
    core = EngineCore(config, Executor.get_class(config), log_stats=True)
    core.collective_rpc("mig_prepare", args=(transfers,))
    return core


def warm_up(core: EngineCore) -> None:
    """Make one token, with logprobs: what ranks them is compiled when first used.

    That takes seconds, in which nothing else on this instance would get on.
    """
    if "generate" not in core.get_supported_tasks():
        return
    request = EngineCoreRequest(
        request_id="warm-up",
        prompt_token_ids=[0],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=1, logprobs=1),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    core.add_request(core.preprocess_add_request(request)[0])
    while core.batch_queue or core.scheduler.has_requests():
        _, executed = core.step_fn()
        core.post_step(executed)
