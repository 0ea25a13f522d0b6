"""What can go on elsewhere exactly, and what cannot: requests and engines of vLLM 0.32.

A part of the seam to vLLM (`engine_seam`): each refusal here is of something that would otherwise
give wrong tokens, or kill the engine that takes the request.
"""

from vllm.sampling_params import SamplingType
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.request import Request

from migration.snapshot import CannotMove


def check_movable(core: EngineCore, request: Request) -> None:
    """Raise CannotMove, with the reason, unless the request can be moved exactly."""
    params = request.sampling_params
    if params is None:
        raise CannotMove("pooling requests do not generate, so they are not moved")
    if request.mm_features or request.prompt_embeds is not None:
        raise CannotMove("requests with images, audio or embeddings are not moved yet")
    if request.resumable:
        raise CannotMove("streaming-input requests are not moved")
    if params.prompt_logprobs is not None and not request.num_output_tokens:
        raise CannotMove("prompt logprobs are still being computed")
    if params.thinking_token_budget is not None and not core.vllm_config.use_v2_model_runner:
        raise CannotMove("vLLM's V1 runner cannot take up a thinking_token_budget half-way")
    _check_engine(core)


def check_continuable(core: EngineCore, request: Request) -> None:
    """Raise CannotMove unless the request can go on from its tokens alone."""
    if request.mm_features or request.prompt_embeds is not None:
        raise CannotMove("requests with images, audio or embeddings are not continued yet")
    params = request.sampling_params
    if params is None or request.resumable:
        raise CannotMove("only requests that generate from one prompt are continued")
    if params.sampling_type is SamplingType.RANDOM_SEED and not can_redraw(core):
        raise CannotMove("seeded requests cannot be continued exactly by this engine's sampler")
    _check_connector(core)


def can_redraw(core: EngineCore) -> bool:
    """Whether the number of tokens alone tells how often a seeded request has drawn, and what.

    vLLM's V2 runner draws by position, its V1 runner one `torch.randint` a token on CPUs; there is
    no telling under speculative decoding, and elsewhere nobody has tried (moving.md, D2).
    """
    config = core.vllm_config
    on_cpu = config.device_config.device_type == "cpu"
    one_draw = on_cpu and not config.model_config.use_fp64_gumbel
    return not core.use_spec_decode and (config.use_v2_model_runner or one_draw)


def _check_engine(core: EngineCore) -> None:
    if not (isinstance(core.model_executor, UniProcExecutor) or core.model_executor.uses_ray):
        raise CannotMove(
            "the engine's workers are no Ray actors, so no collective group joins them:"
            " set distributed_executor_backend to ray"
        )
    if core.use_spec_decode:
        raise CannotMove("speculative decoding keeps state that cannot be moved")
    kv = core.scheduler.kv_cache_manager
    if len(kv.kv_cache_config.kv_cache_groups) != 1:
        raise CannotMove("hybrid KV caches (more than one group) are not moved yet")
    if type(kv.coordinator.single_type_managers[0]) is not FullAttentionManager:
        raise CannotMove("models that drop KV blocks (sliding window) are not moved yet")
    _check_connector(core)


def _check_connector(core: EngineCore) -> None:
    """A connector must hear of each request when it comes; of one that comes so it would not."""
    if core.scheduler.connector is not None:
        raise CannotMove("engines with a KV connector (KV offloading) take no requests over yet")
