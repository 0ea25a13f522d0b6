"""What distinguishes one run of the simulated fleet from another."""

from dataclasses import dataclass
from typing import Literal

from tests.migration.sim.transport import CopyFault

Message = Literal["connect", "reserve", "extend", "receive", "commit", "cancel", "abort"]
Fate = Literal["lost", "unreachable", "late", "answer lost", "cut", "twice"]
Kind = Literal["move", "abort", "preempt", "hang", "die"]


@dataclass(frozen=True, slots=True)
class Request:
    """A client's request: when and where it arrives, prompt tokens and most output tokens."""

    at: float
    where: str
    prompt: int
    most: int


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happens `after` seconds from the start, or from the first `on`."""

    kind: Kind
    after: float
    on: str | None = None
    request: int = 0
    where: str = "A"
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Fault:
    """The fate of the n-th message of this name. `seconds`: how late, or when it is cut."""

    message: Message
    nth: int
    fate: Fate
    seconds: float


@dataclass(frozen=True, slots=True)
class Scenario:
    """All that distinguishes one run from another."""

    requests: tuple[Request, ...]
    events: tuple[Event, ...]
    faults: tuple[Fault, ...] = ()
    copies: tuple[CopyFault, ...] = ()
    delays: tuple[float, ...] = (0.01,)
    blocks: tuple[int, int] = (24, 24)
    step_s: float = 0.05
    block_s: float = 0.02
    answer_s: float = 0.0
    token_s: float = 0.0
    grammar_s: float = 0.0
    depth: int = 1
    max_stages: int = 8
    keep_free: float = 0.0
    timeout_s: float = 10.0
    cancels_travel: bool = True
    leaving_breaks: bool = True
    silent_death: bool = False
