"""Admission: which new requests an ingress takes, so that no queue grows without bound.

A request queues from its arrival to its first token, wherever it is meanwhile. Pure: the clock is
passed in.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, inf
from typing import Literal

from app.config import PriorityClass

PACE_SHARE = 0.1
"""The pace of a queue counts against a new request once its oldest one has waited for this share of
`max_queue_s`: after less, one request more or less would tip the scales."""

RETRY_MIN_S, RETRY_MAX_S = 1, 60


@dataclass(frozen=True, slots=True)
class Full:
    """Why a request is not taken; `detail` is for its client. `retry_after_s`: how long the queue
    will take to drain, from 1 to 60.
    """

    reason: Literal["queued_tokens", "queue_time"]
    detail: str
    retry_after_s: int


@dataclass(frozen=True, slots=True)
class _Waiting:
    """`gone_before`: how many had left the queue when this one came."""

    since: float
    tokens: int
    gone_before: int


class Admission:
    """The queues of all classes. Each call takes constant time."""

    def __init__(self, classes: Mapping[str, PriorityClass]) -> None:
        self._queues = {name: _Queue(name, limits) for name, limits in classes.items()}
        self._of: dict[str, _Queue] = {}

    def check(self, priority_class: str, prompt_tokens: int, now: float) -> Full | None:
        """Why a new request cannot be taken; None where it can, as always by an empty queue."""
        return self._queues[priority_class].check(prompt_tokens, now)

    def arrived(
        self,
        request_id: str,
        priority_class: str,
        prompt_tokens: int,
        now: float,
        patient: bool = False,
    ) -> None:
        """It was taken. `patient`: it lets others of its class pass, and its wait tells nothing."""
        queue = self._of[request_id] = self._queues[priority_class]
        queue.add(request_id, prompt_tokens, now, patient)

    def left(self, request_id: str) -> None:
        """It got its first token or ended without one; later calls do nothing."""
        if queue := self._of.pop(request_id, None):
            queue.remove(request_id)


class _Queue:
    """One class: oldest first, because requests are added as they come."""

    def __init__(self, name: str, limits: PriorityClass) -> None:
        self._name = name
        self._max_tokens, self._max_s = limits.max_queued_tokens or inf, limits.max_queue_s or inf
        self._waiting: OrderedDict[str, _Waiting] = OrderedDict()
        self._patient: dict[str, int] = {}
        self._tokens = 0
        self._gone = 0

    def check(self, tokens: int, now: float) -> Full | None:
        waited = drain_s = 0.0
        if self._waiting:
            oldest = next(iter(self._waiting.values()))
            waited = now - oldest.since
            drain_s = self._drain_s(waited, self._gone - oldest.gone_before)
        if self._tokens and self._tokens + tokens > self._max_tokens:
            return self._full("queued_tokens", f"{self._tokens:,} prompt tokens wait", drain_s)
        paced = waited > PACE_SHARE * self._max_s
        if waited > self._max_s or (paced and drain_s > self._max_s):
            wait_s = max(waited, drain_s)  # one may be stuck while others pass
            return self._full("queue_time", f"its wait is {wait_s:.0f} s", wait_s)
        return None

    def add(self, request_id: str, tokens: int, now: float, patient: bool) -> None:
        if patient:
            self._patient[request_id] = tokens
        else:
            self._waiting[request_id] = _Waiting(now, tokens, self._gone)
        self._tokens += tokens

    def remove(self, request_id: str) -> None:
        if request_id in self._patient:
            self._tokens -= self._patient.pop(request_id)
        else:
            self._tokens -= self._waiting.pop(request_id).tokens
            self._gone += 1

    def _drain_s(self, waited: float, gone: int) -> float:
        """Seconds until all that wait have left, at the pace since the oldest one came."""
        return waited * len(self._waiting) / gone if gone else waited

    def _full(
        self, reason: Literal["queued_tokens", "queue_time"], what: str, drain_s: float
    ) -> Full:
        retry_s = min(max(ceil(drain_s), RETRY_MIN_S), RETRY_MAX_S)
        queue = f"the queue of class {self._name!r} is full"
        return Full(reason, f"{queue}: {what}; try again in {retry_s} s", retry_s)
