"""A small client of the admin API, and streams that are moved while they run."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
from openai import AsyncOpenAI

DEADLINE_S = 120.0


class Fleet:
    """`async with Fleet(url) as fleet`."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def __aenter__(self) -> "Fleet":
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DEADLINE_S))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def get(self, path: str) -> tuple[int, Any]:
        """Status and JSON of a GET."""
        async with self._session.get(self._url + path) as response:
            return response.status, await response.json()

    async def post(self, path: str, body: Any, headers: Any = None) -> tuple[int, Any]:
        """Status and JSON of a POST."""
        async with self._session.post(self._url + path, json=body, headers=headers) as response:
            return response.status, await response.json()

    async def overview(self) -> dict[str, Any]:
        """GET /fleet."""
        _, body = await self.get("/fleet")
        return body

    async def replicas(self) -> list[str]:
        """The ids of the running instances."""
        return [r["replica_id"] for r in (await self.overview())["replicas"]]

    async def request(self, request_id: str) -> dict[str, Any]:
        """GET /fleet/requests/{request_id}."""
        _, body = await self.get(f"/fleet/requests/{request_id}")
        return body

    async def migrate(self, request_id: str, destination: str | None = None) -> tuple[int, Any]:
        """POST /fleet/migrate."""
        body = {"request_id": request_id, "destination": destination}
        return await self.post("/fleet/migrate", body)

    async def until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first overview that meets the condition."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition(overview := await self.overview()):
                await asyncio.sleep(0.05)
        return overview

    async def until_empty(self) -> None:
        """No request holds a block anywhere."""
        await self.until(
            lambda fleet: (
                not any(r["blocks_used"] or r["running"] or r["waiting"] for r in fleet["replicas"])
            )
        )


@dataclass
class Stream:
    """One streamed completion."""

    prompt: str
    max_tokens: int
    request_id: str = ""
    sampling: dict[str, Any] = field(default_factory=lambda: {"temperature": 0})
    model: str = "tiny-llama"
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    async def run(
        self, openai: AsyncOpenAI, at: int | None = None, then: Callable[[], Any] | None = None
    ) -> "Stream":
        """Read it to its end; after `at` tokens, await `then()` beside it."""
        beside: asyncio.Task[Any] | None = None
        chunks = await openai.completions.create(
            model=self.model,
            prompt=self.prompt,
            max_tokens=self.max_tokens,
            stream=True,
            extra_body={"return_token_ids": True, **self.sampling},
            extra_headers={"x-request-id": self.request_id} if self.request_id else {},
        )
        async for chunk in chunks:
            choice = chunk.choices[0]
            self.text += choice.text
            self.token_ids += choice.token_ids or []
            self.finish_reason = choice.finish_reason or self.finish_reason
            if then is not None and beside is None and len(self.token_ids) >= (at or 0):
                beside = asyncio.ensure_future(then())
        if beside is not None:
            await beside
        return self

    def again(self, request_id: str) -> "Stream":
        """The same request under another id, not yet run."""
        return replace(self, request_id=request_id, text="", token_ids=[], finish_reason=None)

    def result(self) -> tuple[str, list[int], str | None]:
        """What must be the same, moved or not."""
        return self.text, self.token_ids, self.finish_reason


def a_prompt(rng: random.Random, tokens: int) -> str:
    """Random words; the tiny model's tokenizer makes a token of each byte."""
    words = (
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9)))
        for _ in range(tokens)
    )
    return " ".join(words)[:tokens]
