"""vLLM's own OpenAI server over a FleetClient. The seam to vLLM 0.32's front end; upgrades start
here.
"""

from argparse import Namespace
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from fastapi import FastAPI
from starlette.middleware import Middleware
from vllm import envs
from vllm.config import VllmConfig
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.launchers.launcher import validate_api_server_args
from vllm.platforms import current_platform
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.executor import UniProcExecutor

from app.config import ModelConfig


def engine(config: VllmConfig, client: EngineCoreClient) -> AsyncLLM:
    """A stock AsyncLLM whose engine is the fleet behind `client`.

    It has no parameter for its client, and asks this factory for one: for the time of the call, and
    in no other, the factory answers ours. The executor class is never used: there is no engine
    here.
    """
    with patch.object(EngineCoreClient, "make_async_mp_client", lambda *_, **__: client):
        return AsyncLLM(config, UniProcExecutor, log_stats=True, log_requests=False)


async def openai_app(
    model: ModelConfig, class_keys: Iterable[str], llm: AsyncLLM, tasks: tuple[Any, ...]
) -> FastAPI:
    """vLLM's FastAPI app: all of its routes, errors and metrics.

    Raises KeyError for a parser of tool calls or of reasoning that vLLM does not know.
    """
    device = llm.vllm_config.device_config.device_type
    # On a host without a GPU the parser would look for the device of vLLM's CUDA build, and fail.
    with patch.object(type(current_platform), "device_type", device):
        args = server_args(model, class_keys)
    args.structured_outputs_config = llm.vllm_config.structured_outputs_config
    _load_parsers(args)
    app = build_app(args, tasks, llm.model_config)
    app.state.server = SimpleNamespace(should_exit=False)  # an engine's error would set it
    await init_app_state(llm, app.state, args, tasks)
    return app


def add_innermost(app: FastAPI, middleware: type) -> None:
    """A middleware within vLLM's own, whose HTTP metrics then see what the client gets."""
    app.user_middleware.append(Middleware(middleware))
    app.middleware_stack = app.build_middleware_stack()  # vLLM has built it already


def server_args(model: ModelConfig, class_keys: Iterable[str]) -> Namespace:
    """The arguments that `vllm serve` would have: vLLM's defaults, and what the YAML sets.

    `class_keys`: the API keys of priority classes. Where VLLM_API_KEY is set, these open it, too.
    """
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    args.model = model.model_source
    args.served_model_name = [model.model_id]
    vars(args).update(model.engine_kwargs)
    # It would keep the query of a score in one engine, and look for it in those of the documents.
    args.enable_flash_late_interaction = False
    if envs.VLLM_API_KEY:
        args.api_key = [envs.VLLM_API_KEY, *class_keys]
    return args


def _load_parsers(args: Namespace) -> None:
    """As `vllm serve` does before it starts."""
    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    validate_api_server_args(args)
