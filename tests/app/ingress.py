"""An ingress without Serve and without vLLM's server: a FleetClient over fake replicas."""

import asyncio
import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest, FinishReason

from app import refusals
from app.config import PriorityClass, RecoveryConfig
from app.fleet_client import FleetClient
from app.gate import Gate
from app.priorities import Priorities
from app.refusals import Answer
from tests.app.fakes import FakeReplicas

RECOVERY = RecoveryConfig()
CLASSES = {"normal": PriorityClass()}


class Ingress:
    """A FleetClient, and what reads its outputs as AsyncLLM does.

    By vLLM's ids: `tokens` that were delivered, and `ends`, how requests ended; `aborted`: those
    that vLLM was to abort, because they were refused. `stop`: a token that ends a request, as a
    stop string does. While `reading` is not set, the reader is busy with what came before.
    """

    def __init__(
        self,
        recovery: RecoveryConfig = RECOVERY,
        classes: Mapping[str, PriorityClass] = CLASSES,
        replicas: str = "ab",
    ) -> None:
        self.replicas = FakeReplicas(replicas)
        self.client = FleetClient(
            self.replicas.handle,  # type: ignore[arg-type]
            self.replicas.inbox,  # type: ignore[arg-type]
            SimpleNamespace(fingerprint="fingerprint", can_redraw=True),  # type: ignore[arg-type]
            Priorities(classes),
            Gate(classes),
            recovery,
        )
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, FinishReason] = {}
        self.aborted: list[str] = []
        self.stop: int | None = None
        self.reading = asyncio.Event()
        self.reading.set()
        self.client.endings.connect(self._abort)
        self._reader = asyncio.get_running_loop().create_task(self._read())

    async def add(
        self,
        request_id: str = "r1",
        answer: Answer | None = None,
        prompt_tokens: int = 8,
        priority: int = 0,
    ) -> Answer:
        """As AsyncLLM does, for an HTTP request with this answer, or else one of its own."""
        answer = answer or Answer()
        token = refusals.current.set(answer)
        await self.client.add_request_async(a_request(request_id, prompt_tokens, priority))
        refusals.current.reset(token)
        return answer

    async def begin(self, *tokens: int, name: str = "r1", answer: Answer | None = None) -> Answer:
        """Add a request that runs at once, and has made these tokens."""
        answer = await self.add(name, answer)
        await at_once()
        await self.go_on(name, *tokens)
        return answer

    async def go_on(self, request_id: str, *tokens: int) -> None:
        """The replica that a request was sent to says that it has it, and makes these tokens."""
        self.replicas.own(request_id)
        if tokens:
            self.replicas.send(request_id, len(self.replicas.tokens[request_id]), tokens)
        await at_once()

    def shown(self, name: str = "r1") -> dict[str, Any]:
        """A request as the admin API shows it."""
        entry = self.client.journal.find(name)
        assert entry is not None
        return entry.to_json()

    async def _abort(self, request_ids: list[str]) -> None:
        self.aborted += request_ids
        await self.client.abort_requests_async(request_ids)

    async def _read(self) -> None:
        while True:
            outputs = (await self.client.get_output_async()).outputs
            await self.reading.wait()
            for output in outputs:
                self.tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
                if output.finish_reason is not None:
                    self.ends[output.request_id] = output.finish_reason
                if self.stop in output.new_token_ids:
                    await self.client.abort_requests_async([output.request_id])


def a_request(request_id: str, prompt_tokens: int = 8, priority: int = 0) -> EngineCoreRequest:
    """As AsyncLLM makes it."""
    return EngineCoreRequest(
        priority=priority,
        request_id=request_id,
        prompt_token_ids=list(range(prompt_tokens)),
        mm_features=None,
        sampling_params=SamplingParams(),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        external_req_id=request_id,
    )


def in_virtual_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """To be called on a virtual loop: `time.monotonic` tells its time."""
    monkeypatch.setattr(time, "monotonic", asyncio.get_running_loop().time)


async def at_once() -> None:
    """Until all has happened that waits for nothing; in virtual time that is exact."""
    await asyncio.sleep(0.001)
