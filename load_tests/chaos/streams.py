"""A copy of a request while it runs: its tokens, their times, and what it came to."""

import asyncio
import json
import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from typing import Any, Literal

import aiohttp

from load_tests.chaos import workload
from load_tests.client import Completion

STREAM_S = 180.0
"""A stream that has not ended by then has failed."""

Verdict = Literal["open", "right", "wrong", "failed"]


class Broken(Exception):
    """The server ended a stream before its time; the message says how."""


@dataclass(frozen=True, slots=True)
class Gap:
    """A time without a token; `tokens`: how many there were by then."""

    tokens: int
    since: float
    until: float

    @property
    def seconds(self) -> float:
        """How long it was."""
        return self.until - self.since


@dataclass(slots=True, eq=False)
class Stream:
    """One copy. Times are seconds of time.perf_counter; `number`: of its request in the pool.

    `error` is empty where all went well; `ended` is 0 as long as it runs.
    """

    name: str
    number: int
    prompt_tokens: int
    started: float = 0.0
    ended: float = 0.0
    arrivals: "array[float]" = field(default_factory=lambda: array("d"))
    token_ids: "array[int]" = field(default_factory=lambda: array("i"))
    text: str = ""
    finish_reason: str | None = None
    error: str = ""

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0] - self.started

    def longest_gap(self, since: float = -inf, until: float = inf) -> Gap | None:
        """The longest time without a token, of those that overlap these times."""
        times = [self.started, *self.arrivals]
        gaps = (Gap(number, *ends) for number, ends in enumerate(pairwise(times)))
        overlapping = (gap for gap in gaps if gap.since <= until and gap.until >= since)
        return max(overlapping, key=lambda gap: gap.seconds, default=None)

    def verdict(self, expected: "Stream") -> Verdict:
        """Beside the same request undisturbed."""
        if not self.ended:
            return "open"
        if self.error:
            return "failed"
        return "right" if self._said() == expected._said() else "wrong"

    def difference(self, expected: "Stream") -> str:
        """One line on a wrong stream."""
        pairs = zip(self.token_ids, expected.token_ids, strict=False)
        shorter = min(len(self.token_ids), len(expected.token_ids))
        where = next((at for at, (one, other) in enumerate(pairs) if one != other), shorter)
        return (
            f"{self.name} (request {self.number}, prompt of {self.prompt_tokens}): differs from"
            f" token {where} of {len(expected.token_ids)} on, ended by {self.finish_reason} after"
            f" {len(self.token_ids)}"
        )

    def _said(self) -> tuple[list[int], str, str | None]:
        return self.token_ids.tolist(), self.text, self.finish_reason

    async def run(self, session: aiohttp.ClientSession, url: str, request: Completion) -> None:
        """Read it to its end. Never raises for what the server does."""
        self.started = time.perf_counter()
        asked = workload.copy_of(request, self.name)
        try:
            async with (
                asyncio.timeout(STREAM_S),
                session.post(
                    f"{url}/v1/completions", json=asked.body(), headers=asked.headers
                ) as response,
            ):
                if response.status != 200:
                    raise Broken(f"HTTP {response.status}: {(await response.text())[:200]}")
                await self._read(response)
        except TimeoutError:
            self.error = f"not at its end after {STREAM_S:.0f} s"
        except (aiohttp.ClientError, ValueError, Broken) as error:
            self.error = f"{type(error).__name__}: {error}"
        self.ended = time.perf_counter()

    async def _read(self, response: aiohttp.ClientResponse) -> None:
        async for line in response.content:
            if line.startswith(b"data: [DONE]"):
                break
            if line.startswith(b"data: "):
                self._take(json.loads(line[len(b"data: ") :]))
        else:
            raise Broken("the stream ended early")
        if self.finish_reason not in ("stop", "length"):
            raise Broken(f"it was ended by {self.finish_reason}")

    def _take(self, event: Mapping[str, Any]) -> None:
        if error := event.get("error"):
            raise Broken(str(error))
        for choice in event["choices"]:
            tokens = choice["token_ids"] or []
            self.arrivals.extend([time.perf_counter()] * len(tokens))
            self.token_ids.extend(tokens)
            self.text += choice["text"]
            self.finish_reason = choice["finish_reason"] or self.finish_reason
