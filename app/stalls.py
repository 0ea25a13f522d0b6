"""How long a request stood still, as vLLM's own events tell it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vllm.v1.engine import EngineCoreEvent
from vllm.v1.engine import EngineCoreEventType as Event


@dataclass(slots=True)
class Stalls:
    """Seconds that a request waited for its first step, and lost to preemptions.

    `preempted_s`: from each preemption to the next token, so queueing and recomputation (the
    paper's preemption loss). `preempted_after_move` counts those at any instance it had moved to: a
    mistake of the policy.
    """

    queue_s: float = 0.0
    preemptions: int = 0
    preempted_s: float = 0.0
    preempted_after_move: int = 0
    _queued_at: float | None = None
    _moved_at: float = math.inf

    def moved(self, now: float) -> None:
        """Another instance runs it from now on."""
        # The first time: what preempts it may hand it on before anybody hears of the preemption.
        self._moved_at = min(self._moved_at, now)

    def observe(self, events: Iterable[EngineCoreEvent], now: float) -> None:
        """What happened since its last token; the next one arrives now."""
        preempted_at: float | None = None
        for event in events:
            match event.type:
                case Event.QUEUED:
                    self._queued_at = event.timestamp
                case Event.SCHEDULED if self._queued_at is not None:
                    self.queue_s = event.timestamp - self._queued_at
                    self._queued_at = None
                case Event.PREEMPTED:
                    self.preemptions += 1
                    self.preempted_after_move += event.timestamp > self._moved_at
                    preempted_at = event.timestamp if preempted_at is None else preempted_at
        if preempted_at is not None:
            self.preempted_s += now - preempted_at

    def to_json(self) -> dict[str, Any]:
        """The admin API's form."""
        return {
            "queue_ms": round(self.queue_s * 1e3, 3),
            "preemptions": self.preemptions,
            "preempted_ms": round(self.preempted_s * 1e3, 3),
            "preempted_after_move": self.preempted_after_move,
        }
