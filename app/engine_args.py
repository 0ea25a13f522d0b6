"""The names and plain types of vLLM's engine and server arguments, read from its source.

Importing vLLM takes ten seconds, reading the few files of it that matter a tenth of one, and a
mistake in a YAML file should be reported at once.
"""

import ast
import importlib.util
from functools import cache
from pathlib import Path

PLAIN_TYPES = {"bool": bool, "int": int, "float": float, "str": str}

# What the fleet itself decides, and what says it instead.
RESERVED = {
    "model": "model.model_source says it",
    "served_model_name": "model.model_id says it",
    "data_parallel_size": "replicas says it",
    "worker_extension_cls": "migration uses it",
    "mm_processor_cache_gb": "an ingress has no cache in common with all of its engines",
    "enable_lora": "a fleet loads no adapters",
    "lora_modules": "a fleet loads no adapters",
    "default_mm_loras": "a fleet loads no adapters",
    "scheduling_policy": "priorities need vLLM's `priority`",
    "profiler_config": "no route of a fleet starts a profile",
}


@cache
def annotations() -> dict[str, str]:
    """Each engine argument, and each of the OpenAI server's, with its annotation as written.

    As in ray.serve.llm, `engine_kwargs` takes both: `tool_call_parser` beside `max_model_len`.
    """
    return {
        **_fields(_vllm() / "engine" / "arg_utils.py", "EngineArgs", "AsyncEngineArgs"),
        **_fields(_vllm() / "entrypoints" / "launchers" / "cli_args.py", "BaseFrontendArgs"),
    }


def _fields(file: Path, *classes: str) -> dict[str, str]:
    return {
        statement.target.id: ast.unparse(statement.annotation)
        for node in _parse(file).body
        if isinstance(node, ast.ClassDef) and node.name in classes
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        if not statement.target.id.startswith("_")
    }


def accepts(name: str, value: object) -> bool:
    """Whether `value` may be given for `name`, as far as plain types and choices can tell."""
    kinds: set[type] = {type(None)}  # for vLLM, None is the default
    choices: set[object] = set()
    for part in annotations()[name].split(" | "):
        if part in PLAIN_TYPES:
            kinds.add(PLAIN_TYPES[part])
        elif part != "None":
            if (named := _choices(part)) is None:
                return True  # a type of vLLM's own: the engine checks it when it starts
            choices |= named
    if float in kinds:
        kinds.add(int)
    return type(value) in kinds or (isinstance(value, str | int) and value in choices)


def meaning(name: str) -> str:
    """The annotation of `name` for a message, with named choices written out."""
    written = annotations()[name]
    choices = _choices(written)
    return "one of " + ", ".join(sorted(map(str, choices))) if choices else written


@cache
def _choices(alias: str) -> frozenset[object] | None:
    """The values of the `Literal` that vLLM's configuration calls `alias`, if it is one."""
    for path in sorted((_vllm() / "config").glob("*.py")):
        if f"\n{alias} = Literal[" not in path.read_text():
            continue
        for node in _parse(path).body:
            match node:
                case ast.Assign([ast.Name(name)], ast.Subscript(slice=ast.Tuple(values))):
                    if name == alias and all(isinstance(value, ast.Constant) for value in values):
                        return frozenset(map(ast.literal_eval, values))
    return None


def _vllm() -> Path:
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("vLLM is not installed: make install")
    return Path(found.origin).parent


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())
