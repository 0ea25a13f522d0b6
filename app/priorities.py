"""The classes of requests: who may use which, and which of them a request is in."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from app.config import PriorityClass


@dataclass(frozen=True, slots=True)
class Caller:
    """What an API key lets its requests be: of one of `usable`, the most urgent first."""

    usable: tuple[str, ...]
    default: str


class Priorities:
    """Places each request in a class: header, body field, API key's default, `normal`, in turn.

    No request is more urgent than the most urgent class that its caller may use. Priorities are
    vLLM's: lower is more urgent.
    """

    def __init__(self, classes: Mapping[str, PriorityClass]) -> None:
        self.names = tuple(sorted(classes))
        self._classes = dict(sorted(classes.items(), key=lambda item: item[1].priority))
        self._anybody = Caller(tuple(self._usable(None)), "normal")
        self._callers = {_digest(key): self._caller_of(key) for key in self.api_keys}

    @property
    def api_keys(self) -> set[str]:
        """All keys that open some class."""
        return {key for one in self._classes.values() for key in one.api_keys}

    def caller(self, authorization: str | None) -> Caller | None:
        """Of an Authorization header; None where it has no key that is known here."""
        scheme, _, token = (authorization or "").partition(" ")
        return self._callers.get(_digest(token)) if scheme.lower() == "bearer" else None

    def place(self, caller: Caller | None, named: str | None, priority: int) -> tuple[str, int]:
        """Class and vLLM priority of a request.

        `named`: the class in its header, if any; `priority`: the body's, where 0 says nothing.
        """
        caller = caller or self._anybody
        if named is None and priority:
            most_urgent = self._classes[caller.usable[0]].priority
            return self._falls_into(caller, priority), max(priority, most_urgent)
        name = named or caller.default
        if name not in caller.usable:
            name = self._falls_into(caller, self._classes[name].priority)
        return name, self._classes[name].priority

    def is_patient(self, name: str, priority: int) -> bool:
        """Whether the others of its class pass a request of this priority, maybe for ever."""
        return priority > self._classes[name].priority

    def _falls_into(self, caller: Caller, priority: int) -> str:
        """The most urgent class that is not more urgent than this, or else the least urgent."""
        urgent_enough = (n for n in caller.usable if self._classes[n].priority >= priority)
        return next(urgent_enough, caller.usable[-1])

    def _caller_of(self, key: str) -> Caller:
        usable = tuple(self._usable(key))
        return Caller(usable, next(n for n in usable if key in self._classes[n].api_keys))

    def _usable(self, key: str | None) -> Iterator[str]:
        for name, one in self._classes.items():
            if not one.api_keys or key in one.api_keys:
                yield name


def _digest(key: str) -> bytes:
    """To look a key up by: the time that takes tells nothing about the keys that are known."""
    return hashlib.sha256(key.encode()).digest()
