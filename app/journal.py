"""The ingress' journal: what it knows of each request, and the order of its tokens.

Deltas carry the index of their first token. The journal puts them in order, drops what it has seen,
and keeps the tokens so far, so that a request can be continued whatever happens to its instance.
"""

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vllm.v1.engine import EngineCoreOutput, FinishReason

from app.refusals import Answer
from app.stalls import Stalls
from migration.snapshot import MigrationRecord, Submission

ENDED_KEPT = 1000
"""Requests that ended and are still shown (design.md §5)."""

HELD_MAX = 4096
"""Outputs kept while an earlier one is missing; more are dropped, and the request then fails."""

State = Literal["waiting", "running", "finished", "aborted", "failed"]

_ENDS: dict[FinishReason | None, State] = {
    FinishReason.ABORT: "aborted",
    FinishReason.ERROR: "failed",
}


@dataclass(slots=True, eq=False)
class Entry:
    """One request: a completion has one for each of its sequences.

    `aliases` are other ids that a client may know it by. `gap_since`: when a later token came
    before an earlier one; `left_at`: when its last replica said that it had finished there.
    `answer`: to its HTTP request; `opened_at`: when that came.
    """

    submission: Submission
    aliases: tuple[str, ...] = ()
    answer: Answer = field(default_factory=Answer)
    opened_at: float = 0.0
    state: State = "waiting"
    tokens: list[int] = field(default_factory=list)
    replicas: list[str] = field(default_factory=list)
    migrations: list[MigrationRecord] = field(default_factory=list)
    held: dict[int, EngineCoreOutput] = field(default_factory=dict)
    call: asyncio.Task[None] | None = None
    gap_since: float | None = None
    left_at: float | None = None
    output_tokens: int = 0
    stalls: Stalls = field(default_factory=Stalls)

    @property
    def ended(self) -> bool:
        """Whether its last token or its failure was delivered."""
        return self.state in ("finished", "aborted", "failed")

    @property
    def unplaced(self) -> bool:
        """Whether no instance is known to have it."""
        return self.state == "waiting" and not self.replicas

    def accept(self, first: int, output: EngineCoreOutput) -> list[EngineCoreOutput]:
        """The outputs that can be delivered now that this one arrived, in order."""
        if first > len(self.tokens):
            self._hold(first, output)
            return []
        ready = self._fresh(first, output)
        while self.held and (next_held := min(self.held)) <= len(self.tokens):
            ready += self._fresh(next_held, self.held.pop(next_held))
        if not self.held:
            self.gap_since = None
        return ready

    def moved_to(self, replica_id: str) -> None:
        """Another replica owns it now."""
        if not self.replicas or self.replicas[-1] != replica_id:
            if self.replicas:
                self.stalls.moved(time.monotonic())
            self.replicas.append(replica_id)

    def _fresh(self, first: int, output: EngineCoreOutput) -> list[EngineCoreOutput]:
        seen = len(self.tokens) - first
        if seen:
            if seen >= len(output.new_token_ids):
                return []
            output.new_token_ids = output.new_token_ids[seen:]
        if output.events:
            self.stalls.observe(output.events, time.monotonic())
        self.tokens += output.new_token_ids
        self.output_tokens = len(self.tokens)
        self.state = _ENDS.get(output.finish_reason, "finished") if output.finished else "running"
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
            "recoveries": 0,
            **self.stalls.to_json(),
        }


class Journal:
    """Running requests by the engines' id, and all that are shown by their public one."""

    def __init__(self) -> None:
        self._live: dict[str, Entry] = {}
        self._ended: OrderedDict[str, Entry] = OrderedDict()
        self._names: dict[str, Entry] = {}

    def get(self, request_id: str) -> Entry | None:
        """The running request with this id inside the engines."""
        return self._live.get(request_id)

    def known(self, request_id: str) -> Entry | None:
        """Like `get`, or one that ended lately: word of its last move may come after its end."""
        return self._live.get(request_id) or self._ended.get(request_id)

    def live(self) -> list[Entry]:
        """All running requests."""
        return list(self._live.values())

    def shown(self) -> list[Entry]:
        """Running requests, then the last that ended, newest first."""
        return [*self._live.values(), *reversed(self._ended.values())]

    def find(self, name: str) -> Entry | None:
        """By X-Request-Id or the id in the response; of several, the running or last one."""
        named = self._names.get(name)
        if named is None or not named.ended:
            return named
        return next((entry for entry in self._live.values() if name in entry.aliases), named)

    def free_public_id(self, wanted: str) -> str:
        """`wanted`, or with a number where a running request (a sibling of n > 1) has it."""
        public_id, number = wanted, 0
        while (entry := self._names.get(public_id)) is not None and not entry.ended:
            number += 1
            public_id = f"{wanted}.{number}"
        return public_id

    def open(self, entry: Entry) -> None:
        """A new request."""
        self._live[entry.submission.request_id] = entry
        for name in entry.aliases:
            known = self._names.get(name)
            if known is None or known.ended:
                self._names[name] = entry
        self._names[entry.submission.public_id] = entry

    def close(self, entry: Entry) -> None:
        """The request ended; keep it for a while, without its tokens."""
        if self._live.pop(entry.submission.request_id, None) is None:
            return
        entry.tokens, entry.held = [], {}
        entry.submission = replace(entry.submission, request=b"")
        self._ended[entry.submission.request_id] = entry
        while len(self._ended) > ENDED_KEPT:
            _, oldest = self._ended.popitem(last=False)
            for name in (oldest.submission.public_id, *oldest.aliases):
                if self._names.get(name) is oldest:
                    del self._names[name]
