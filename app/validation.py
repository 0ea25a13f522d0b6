"""What is wrong with a mapping that pydantic refused, in one line for the person who wrote it."""

import difflib
import textwrap
from collections.abc import Iterable
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError
from pydantic_core import ErrorDetails


class ConfigError(ValueError):
    """One line: the key by its dotted path, what is wrong with it, and a hint."""


def problem(error: ValidationError, model: type[BaseModel], whole: str = "") -> str:
    """The first of the errors that `model` found, the key by its dotted path, and a hint.

    `whole` is what to call all of the mapping, where no key of it is to blame.
    """
    first, *others = error.errors()
    path = ".".join(str(key) for key in first["loc"] if not _is_tag(key)) or whole
    more = f" (and {len(others)} more)" if others else ""
    return f"{path}: {_what(first, model)}{more}".removeprefix(": ")


def hint(key: object, known: Iterable[str]) -> str:
    """'; did you mean ...?', or the known keys where none is close and they are few."""
    known = sorted(known)
    close = difflib.get_close_matches(str(key), known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known here: {', '.join(known)}" if len(known) <= 20 else ""


def show(value: object) -> str:
    """A wrong value, shortened."""
    return textwrap.shorten(repr(value), 60, placeholder="...")


def _what(error: ErrorDetails, model: type[BaseModel]) -> str:
    *parents, key = error["loc"] or ("",)
    match error["type"]:
        case "extra_forbidden":
            return f"unknown key{hint(key, _section(model, parents).model_fields)}"
        case "missing":
            return f"missing; it is {_section(model, parents).model_fields[str(key)].description}"
        case "literal_error":
            choices = get_args(_section(model, parents).model_fields[str(key)].annotation)
            return f"{show(error['input'])} is not known{hint(error['input'], choices)}"
        case "value_error":
            return str(error["ctx"]["error"])
        case "model_type" | "dict_type":
            return f"must be a mapping of keys, not {show(error['input'])}"
    given = "" if _is_secret(error["loc"]) else f", not {show(error['input'])}"
    return error["msg"].replace("Input should", "must") + given


def _section(model: type[BaseModel], path: Iterable[object]) -> type[BaseModel]:
    """The model of the section at a path of keys."""
    kind: Any = model
    for key in path:
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
        elif _is_tag(key):
            kind = next(one for one in get_args(kind) if Tag(str(key)) in one.__metadata__)
            kind = get_args(kind)[0]
        else:
            kind = _without_none(kind.model_fields[key].annotation)
    section: type[BaseModel] = kind
    return section


def _without_none(kind: Any) -> Any:
    optional = get_origin(kind) in (Union, UnionType) and type(None) in get_args(kind)
    return get_args(kind)[0] if optional else kind


def _is_secret(path: Iterable[object]) -> bool:
    """Whether what stands there may be an API key, which no log should have."""
    return any(str(key).startswith("api_key") for key in path)


def _is_tag(key: object) -> bool:
    """Whether it names an alternative of a discriminated union, and is no key of the file."""
    return str(key).startswith("<")
