"""Entry: what an ingress knows of one request, and the order of its tokens.

Deltas carry the index of their first token: they are put in order, and what was seen is dropped.
"""

import asyncio
import math
import time
from array import array
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vllm.v1.engine import EngineCoreOutput, FinishReason

from app.refusals import Answer
from app.stalls import Stalls
from deployments.messages import Route
from migration.snapshot import MigrationRecord, Submission

PARAMETERS = 1024
"""Bytes of a request beside its prompt, more or less."""

HELD_MAX = 4096
"""Outputs kept while an earlier one is missing; more are dropped, and the request then fails."""

MIGRATIONS_MAX = 100
"""The last attempts to move a request that are kept of it."""

State = Literal["waiting", "running", "finished", "aborted", "failed"]

_ENDS: dict[FinishReason | None, State] = {
    FinishReason.ABORT: "aborted",
    FinishReason.ERROR: "failed",
}


@dataclass(slots=True, eq=False)
class Entry:
    """One request: a completion has one for each of its sequences.

    `request_id` is vLLM's; inside the engines its name is `submission.request_id`, another one each
    time that it is submitted. `aliases` are ids that a client may know it by; `siblings`: how many
    others wanted its public one. `answer`: to its HTTP request. `continuable`: whether its tokens
    are all that it takes to go on elsewhere. `tokens`: the output so far, while it is `kept`;
    `prompt_size`: what its prompt takes, in tokens of four bytes (images have few tokens, and many
    bytes). `over` is set when it has ended.
    `open`: the call to its replica; `route`: where that went, `sent_at`; `attached`: where it has
    moved; `dropped`: why it was cut off here. `owners`: the replicas that had it since it was
    submitted, each with the number of its first token; `strangers`: others that spoke of it.
    `loss`: how its owner before that was lost.
    Monotonic seconds: `unplaced_since` no replica has been known to have it; `gap_since` a later
    token came before an earlier one; `lost_at` its replica was found to be lost, until the next
    token. `recovered_s` sums these pauses.
    """

    submission: Submission
    aliases: tuple[str, ...] = ()
    answer: Answer = field(default_factory=Answer)
    unplaced_since: float | None = 0.0
    route: Route = field(default_factory=Route)
    continuable: bool = True
    state: State = "waiting"
    kept: bool = True
    tokens: "array[int]" = field(default_factory=lambda: array("i"))
    replicas: list[str] = field(default_factory=list)
    migrations: deque[MigrationRecord] = field(default_factory=lambda: deque(maxlen=MIGRATIONS_MAX))
    siblings: int = 0
    held: dict[int, EngineCoreOutput] = field(default_factory=dict)
    call: asyncio.Task[None] | None = None
    open: asyncio.Future[Any] | None = None
    owners: list[tuple[str, int]] = field(default_factory=list)
    strangers: set[str] = field(default_factory=set)
    sent_at: float = 0.0
    attached: str | None = None
    dropped: Exception | None = None
    loss: str = ""
    over: asyncio.Event = field(default_factory=asyncio.Event)
    gap_since: float | None = None
    lost_at: float | None = None
    recovered_s: float = 0.0
    recoveries: int = 0
    submissions: int = 1
    output_tokens: int = 0
    stalls: Stalls = field(default_factory=Stalls)
    request_id: str = field(init=False)
    prompt_size: int = field(init=False)

    def __post_init__(self) -> None:
        self.request_id = self.submission.request_id
        tokens, octets = self.submission.prompt_tokens, len(self.submission.request)
        self.prompt_size = max(tokens, (octets - PARAMETERS) // 4)

    @property
    def ended(self) -> bool:
        """Whether its last token or its failure was delivered."""
        return self.state in ("finished", "aborted", "failed")

    @property
    def resumable(self) -> bool:
        """Whether it can be submitted again, and go on where it is."""
        return bool(self.submission.request) and (self.continuable or not self.output_tokens)

    def waited(self, now: float) -> float:
        """Seconds since when no replica has been known to have it."""
        return now - self.unplaced_since if self.unplaced_since is not None else 0.0

    @property
    def place(self) -> str | None:
        """The replica that has it, or that it was sent to."""
        return self.owners[-1][0] if self.owners else self.route.chosen

    @property
    def asked(self) -> str | None:
        """The replica that its open call is at: while it moves, not the one that has it."""
        return self.attached or self.route.chosen

    def accept(self, first: int, output: EngineCoreOutput) -> list[EngineCoreOutput]:
        """The outputs that can be delivered now that this one arrived, in order."""
        if first > self.output_tokens:
            self._hold(first, output)
            return []
        ready = self._fresh(first, output)
        while self.held and (next_held := min(self.held)) <= self.output_tokens:
            ready += self._fresh(next_held, self.held.pop(next_held))
        if not self.held:
            self.gap_since = None
        return ready

    def owned_by(self, replica_id: str, first: int) -> bool:
        """This replica says that it has the request, from token `first` on; False if it has not.

        Another may have gone on meanwhile, because it took this one for dead in the middle of a
        move: whoever has been heard further is the owner.
        """
        if first < self.output_tokens:
            return False
        before = sum(begun <= first for _, begun in self.owners)
        after = len(self.owners) - before  # heard from first, though they had it later
        if before and not after:
            self.stalls.moved(time.monotonic())
        self.unplaced_since = None
        self.owners.insert(before, (replica_id, first))
        if not self.replicas or self.replicas[-1] != replica_id:
            self.replicas.insert(len(self.replicas) - after, replica_id)
        self.held = {number: output for number, output in self.held.items() if number < first}
        self.gap_since = self.gap_since if self.held else None
        if not self.kept:
            self.strip()
        return True

    def may_say(self, replica_id: str, first: int, output: EngineCoreOutput) -> bool:
        """Whether these tokens are of their owner: each has those before the next one's first."""
        until = math.inf
        for owner, begun in reversed(self.owners):
            if owner == replica_id:
                return begun <= first and first + len(output.new_token_ids) <= until
            until = begun
        return False

    def strip(self) -> None:
        """Let go of the prompt: it will not be submitted again."""
        self.submission = replace(self.submission, request=b"")

    def _fresh(self, first: int, output: EngineCoreOutput) -> list[EngineCoreOutput]:
        seen = self.output_tokens - first
        if seen:
            if seen >= len(output.new_token_ids):
                return []
            output.new_token_ids = output.new_token_ids[seen:]
        now = time.monotonic()
        if output.events:
            self.stalls.observe(output.events, now)
        if self.lost_at is not None:
            self.recovered_s += now - self.lost_at
            self.lost_at = None
        self.output_tokens += len(output.new_token_ids)
        if self.kept:
            self.tokens.extend(output.new_token_ids)
        self.state = _ENDS.get(output.finish_reason, "finished") if output.finished else "running"
        output.request_id = self.request_id
        return [output]

    def _hold(self, first: int, output: EngineCoreOutput) -> None:
        if self.gap_since is None:
            self.gap_since = time.monotonic()
        if len(self.held) < HELD_MAX:
            self.held[first] = output

    def to_json(self) -> dict[str, Any]:
        """The admin API's form (design.md §5)."""
        return {
            "request_id": self.submission.public_id,
            "state": self.state,
            "priority": self.submission.priority_class,
            "prompt_tokens": self.submission.prompt_tokens,
            "output_tokens": self.output_tokens,
            "replicas": list(self.replicas),
            "migrations": [record.to_json() for record in self.migrations],
            "recoveries": self.recoveries,
            "recovered_ms": round(self.recovered_s * 1e3, 3),
            **self.stalls.to_json(),
        }
