"""Finds what is wrong in a Serve YAML file before Ray starts, and says it in one line.

`serve run` accepts keys it does not know, buries an error of `args` under eighty lines of traceback
and then goes on waiting. So the same checks run twice: on the file (`python -m app check`), where
they cost a second, and again where Serve builds the application (`validate_args`).
"""

import difflib
import importlib.util
import logging
import os
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from app.config import FleetConfig, load, local_folder
from app.resources import resources
from app.validation import ConfigError, hint

logger = logging.getLogger("ray.serve.llumnix")

IMPORT_PATHS = ("app.main:build_app", "app.main.build_app")
DEPLOYMENTS = ("Ingress", "Scheduler", "LLMReplica")


def check_file(file: Path) -> str:
    """A summary of a valid file. Raises ConfigError, whose line starts with the file's name."""
    try:
        return _check(read_yaml(file))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def validate_args(args: Mapping[str, Any]) -> FleetConfig:
    """An application's `args`, checked as a whole: for the builder that Serve calls.

    Where the cluster may have, or get, other machines, their folders and GPUs are not judged: Serve
    waits for them. Of too few GPUs it only warns: an entry of the file's `deployments:`, which is
    not seen here, may take less. Raises ConfigError.
    """
    config = load(args)
    if _single_machine():
        _check_model(config)
        wanted = gpus_wanted(config)
        try:
            _check_gpus(wanted)
        except ConfigError as error:
            logger.warning("%s; replicas wait for more, unless `deployments:` takes less", error)
    return config


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError."""
    try:
        content = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError("cannot be read: it is not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"{line}{getattr(error, 'problem', None) or error}") from None
    if not isinstance(content, dict):
        raise ConfigError("must be a mapping with the key 'applications'")
    return content


def gpus_wanted(config: FleetConfig, override: Mapping[str, Any] | None = None) -> float:
    """GPUs that the replicas take together, with the `deployments:` entry that overrides them."""
    override = override or {}
    autoscaling = override.get("autoscaling_config") or {}
    each = _gpus_of_one(resources(config), override)
    replicas = override.get("num_replicas", autoscaling.get("min_replicas", config.first_replicas))
    return each * (1 if replicas == "auto" else replicas)


def _gpus_of_one(ours: Mapping[str, Any], override: Mapping[str, Any]) -> float:
    """A placement group holds its bundles, whatever the actor within it takes."""
    if bundles := {**ours, **override}.get("placement_group_bundles"):
        return sum(bundle.get("GPU", 0) for bundle in bundles)
    actor = override.get("ray_actor_options") or ours["ray_actor_options"]
    return float(actor.get("num_gpus", 0))


def _check_actor_options(ours: Mapping[str, Any], override: Mapping[str, Any]) -> None:
    """Serve does not merge them: a GPU that is not named again would be taken away."""
    theirs = override.get("ray_actor_options")
    for key in ("num_gpus", "accelerator_type"):
        if theirs and key in ours["ray_actor_options"] and key not in theirs:
            value = ours["ray_actor_options"][key]
            raise ConfigError(
                "deployments.LLMReplica.ray_actor_options: these are instead of ours, so they need"
                f" {key}, too (ours: {value})"
            )


def _check(content: dict[str, Any]) -> str:
    from ray.serve.schema import ServeDeploySchema

    for path, problem in _unknown_keys(content, ServeDeploySchema):
        raise ConfigError(f"{path}: {problem}")
    try:
        ServeDeploySchema.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        path = _dotted(first["loc"], content)
        raise ConfigError(f"{path}: {_one_line(first['msg'])}" if path else first["msg"]) from None
    except Exception as error:  # the schema imports classes that the file names
        raise ConfigError(_one_line(str(error))) from None

    fleets = []
    gpus = 0.0
    for application in content["applications"]:
        where = f"applications.{application.get('name', 'default')}"
        try:
            _check_import_path(application)
            if application["import_path"] not in IMPORT_PATHS:
                continue
            overrides = _overrides(application)
        except ConfigError as error:
            raise ConfigError(f"{where}.{error}") from None
        try:
            config = load(application.get("args") or {})
            _check_model(config)
            ours = resources(config)
        except ConfigError as error:
            raise ConfigError(f"{where}.args.{error}") from None
        override = overrides.get("LLMReplica") or {}
        try:
            _check_actor_options(ours, override)
        except ConfigError as error:
            raise ConfigError(f"{where}.{error}") from None
        gpus += gpus_wanted(config, override)
        fleets.append(f"{config.model.model_id}, {_replicas(config)} replicas")
    _check_gpus(gpus)
    return "; ".join(fleets) or "no application of ours"


def _replicas(config: FleetConfig) -> str:
    scaled = config.autoscaling
    return f"{scaled.min} to {scaled.max}" if scaled else str(config.replicas)


def _check_import_path(application: Mapping[str, Any]) -> None:
    if "runtime_env" in application:
        return  # the code may come from there
    path = application["import_path"]
    module, _, attribute = path.replace(":", ".").rpartition(".")
    try:
        found = importlib.util.find_spec(module) is not None
    except ImportError:
        found = False
    if not found or (module == "app.main" and attribute != "build_app"):
        guess = difflib.get_close_matches(path, IMPORT_PATHS, n=1)
        did_you_mean = f"; did you mean {guess[0]!r}?" if guess else ""
        raise ConfigError(f"import_path: {path!r} is not found from here{did_you_mean}")


def _overrides(application: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    overrides = {entry["name"]: entry for entry in application.get("deployments") or []}
    for name in overrides:
        if name not in DEPLOYMENTS:
            known = hint(name, DEPLOYMENTS)
            raise ConfigError(f"deployments.{name}: the fleet has no such deployment{known}")
    return overrides


def _check_model(config: FleetConfig) -> None:
    source = config.model.model_source
    folder = local_folder(source)
    if folder is None:
        _check_hub(source)
    elif not folder.is_dir():
        siblings = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        close = difflib.get_close_matches(folder.name, siblings, n=1)
        did_you_mean = f"; did you mean {close[0]!r}?" if close else ""
        tiny = "; `make model` builds it" if folder.name == "tiny-llama" else ""
        raise ConfigError(f"model.model_source: no folder {folder}{tiny or did_you_mean}")
    elif not (folder / "config.json").is_file():
        raise ConfigError(f"model.model_source: {folder} holds no config.json, so no model")


def _check_hub(source: str) -> None:
    if "://" in source:
        return  # only vLLM knows how to reach it
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        if isinstance(try_to_load_from_cache(source, "config.json"), str):
            return
        HfApi().model_info(source, timeout=10)
    except (HFValidationError, RepositoryNotFoundError):
        problem = "is neither a folder here nor a model that the hub shows you"
    except Exception:  # whatever the network does: the engines could not load it either
        problem = "is no folder here, nor in the hub's cache, and the hub cannot be reached"
    else:
        return
    raise ConfigError(f"model.model_source: {source!r} {problem}")


def _check_gpus(wanted: float) -> None:
    if not wanted:
        return
    there = _gpus_there()
    if wanted > there:
        raise ConfigError(f"{wanted:g} GPUs are asked for by the replicas, but {there:g} are there")


def _gpus_there() -> float:
    import ray

    started = not ray.is_initialized() and "RAY_ADDRESS" in os.environ
    if started:
        ray.init(address="auto", log_to_driver=False, logging_level="error")
    if not ray.is_initialized():
        import torch

        return float(torch.cuda.device_count())
    try:
        now = ray.cluster_resources().get("GPU", 0)
        return float(max(now, _autoscaler_resources().get("GPU", 0)))
    finally:
        if started:
            ray.shutdown()


def _single_machine() -> bool:
    """Whether this machine is all there is: false where workers may have yet to join it."""
    import ray

    if not ray.is_initialized():
        return True
    nodes = [node for node in ray.nodes() if node["Alive"]]
    # A head without CPUs, as KubeRay's are, runs no replica and waits for its workers.
    return (
        len(nodes) == 1 and bool(nodes[0]["Resources"].get("CPU")) and not _autoscaler_resources()
    )


def _autoscaler_resources() -> dict[str, float]:
    """The most that Ray's autoscaler may start; empty where there is none."""
    from ray._private.state import state

    return state.get_max_resources_from_cluster_config() or {}


def _unknown_keys(value: Any, schema: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Each key that the schema does not have, for Serve itself ignores it without a word."""
    arms = get_args(schema) if get_origin(schema) in (Union, types.UnionType) else (schema,)
    for arm in arms:
        if get_origin(arm) is list and isinstance(value, list):
            for index, item in enumerate(value):
                name = item.get("name", index) if isinstance(item, dict) else index
                yield from _unknown_keys(item, get_args(arm)[0], f"{path}.{name}".lstrip("."))
        elif isinstance(arm, type) and issubclass(arm, BaseModel) and isinstance(value, dict):
            for key, item in value.items():
                where = f"{path}.{key}".lstrip(".")
                if key not in arm.model_fields:
                    yield where, f"unknown key{hint(key, arm.model_fields)}"
                else:
                    yield from _unknown_keys(item, arm.model_fields[key].annotation, where)


def _dotted(location: tuple[int | str, ...], content: Any) -> str:
    """A pydantic location with the names of applications and deployments for their indices."""
    parts = []
    for key in location:
        try:
            content = content[key]
        except (KeyError, IndexError, TypeError):
            content = None
        named = isinstance(key, int) and isinstance(content, dict) and "name" in content
        parts.append(str(content["name"] if named else key))
    return ".".join(parts)


def _one_line(message: str) -> str:
    return " ".join(message.removeprefix("Value error, ").split())


def main(file: Path) -> int:
    """Prints the verdict on a file. The exit code is 0 where it is valid."""
    try:
        print(f"{file}: ok ({check_file(file)})")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    return 0
