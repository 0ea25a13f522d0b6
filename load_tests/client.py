"""A light streaming client: many /v1/completions streams in one event loop, each token timed.

It only looks for the ends of SSE events as they arrive; JSON is parsed for the last one alone, the
usage. vLLM may put several tokens into one event when its front end falls behind.
"""

import asyncio
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import aiohttp

TIMEOUT_S = 300.0
TOKEN_IDS = b'"token_ids":['


@dataclass(frozen=True, slots=True)
class Completion:
    """One request: a greedy completion of exactly `output_tokens` tokens."""

    model: str
    prompt: str
    output_tokens: int
    headers: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """As /v1/completions takes it; `extra` overrides."""
        return {
            "model": self.model,
            "prompt": self.prompt,
            "max_tokens": self.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }


@dataclass(slots=True)
class Record:
    """What became of one request. Times are seconds of time.perf_counter.

    `arrivals` has one time for each event that carried tokens, or for each token where the stream
    names them (`return_token_ids`); then `token_ids` has them all, each with a comma after it.
    `error` is empty where all went well.
    """

    started: float
    arrivals: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    token_ids: bytes = b""
    error: str = ""

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0] - self.started

    @property
    def latency(self) -> float:
        """Seconds to the last token."""
        return self.arrivals[-1] - self.started

    @property
    def tpot(self) -> float:
        """Seconds for each token after the first."""
        return (self.latency - self.ttft) / max(1, self.output_tokens - 1)

    @property
    def itl(self) -> list[float]:
        """Seconds between events with tokens."""
        return [later - sooner for sooner, later in pairwise(self.arrivals)]


class Events:
    """Cuts a byte stream into SSE events: counts their tokens, keeps the ids of named ones and the
    last event's data.
    """

    def __init__(self) -> None:
        self._rest = b""
        self.last = b""
        self.token_ids = b""
        self.done = False

    def feed(self, data: bytes) -> int:
        """How many tokens `data` completes: those named, else one for an event that has any."""
        *events, self._rest = (self._rest + data).split(b"\n\n")
        tokens = 0
        for event in events:
            if event.startswith(b"data: [DONE]"):
                self.done = True
            elif event:
                self.last = event
                tokens += self._tokens(event)
        return tokens

    def _tokens(self, event: bytes) -> int:
        named = event.rfind(TOKEN_IDS)
        if named < 0:
            return b'"choices":[]' not in event and b'"error"' not in event[:20]
        ids = event[named + len(TOKEN_IDS) : event.index(b"]", named)]
        if not ids:
            return 0
        self.token_ids += ids + b","
        return ids.count(b",") + 1

    def usage(self) -> dict[str, int]:
        """The usage of a stream that ended. Raises ValueError with what the server said instead."""
        payload = json.loads(self.last.removeprefix(b"data: ") or b"{}")
        if not self.done or not payload.get("usage"):
            raise ValueError(f"the stream ended early: {payload.get('error') or payload}")
        usage: dict[str, int] = payload["usage"]
        return usage


class Progress(Protocol):
    """Told of each request that ended."""

    def __call__(self, record: Record) -> None: ...


async def stream(session: aiohttp.ClientSession, url: str, request: Completion) -> Record:
    """Send one request and read all of its stream. Never raises for what the server does."""
    record = Record(time.perf_counter())
    try:
        async with session.post(
            f"{url}/v1/completions", json=request.body(), headers=request.headers
        ) as response:
            if response.status != 200:
                record.error = f"HTTP {response.status}: {(await response.text())[:200]}"
            else:
                await _read(response, record)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        record.error = f"{type(error).__name__}: {error}"
    record.ended = time.perf_counter()
    return record


async def closed_loop(
    url: str,
    requests: Iterable[Completion],
    concurrency: int,
    progress: Progress | None = None,
) -> list[Record]:
    """`concurrency` users, each sending its next request when its last one has ended."""
    queue = iter(requests)
    records: list[Record] = []

    async def user() -> None:
        for request in queue:
            records.append(await stream(session, url, request))
            if progress:
                progress(records[-1])

    async with connect(concurrency) as session, asyncio.TaskGroup() as users:
        for _ in range(concurrency):
            users.create_task(user())
    return records


async def open_loop(
    session: aiohttp.ClientSession,
    url: str,
    arrivals: Sequence[tuple[float, Completion]],
    progress: Progress | None = None,
) -> list[Record]:
    """Sends each request at its time, in seconds from now, whatever became of those before it.

    The records are in the order of the requests.
    """
    start = time.perf_counter()

    async def send(at: float, request: Completion) -> Record:
        await asyncio.sleep(start + at - time.perf_counter())
        record = await stream(session, url, request)
        if progress:
            progress(record)
        return record

    async with asyncio.TaskGroup() as senders:
        sent = [senders.create_task(send(at, request)) for at, request in arrivals]
    return [task.result() for task in sent]


def connect(connections: int = 0, timeout_s: float = TIMEOUT_S) -> aiohttp.ClientSession:
    """A session with at most so many connections; 0 for no limit. `timeout_s`: for one request."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections),
        timeout=aiohttp.ClientTimeout(total=timeout_s),
    )


async def _read(response: aiohttp.ClientResponse, record: Record) -> None:
    events = Events()
    async for data in response.content.iter_any():
        now = time.perf_counter()
        record.arrivals += [now] * events.feed(data)
    usage = events.usage()
    record.prompt_tokens = usage["prompt_tokens"]
    record.output_tokens = usage["completion_tokens"]
    record.token_ids = events.token_ids
