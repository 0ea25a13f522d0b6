"""Endings: how a request that gets no more tokens ends in vLLM's front end."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

from app.refusals import Answer, Refusal

Abort = Callable[[list[str]], Awaitable[None]]


class Endings:
    """Ends requests by a refusal, or by an error where there is no HTTP answer to refuse."""

    def __init__(self, outputs: asyncio.Queue[EngineCoreOutputs]) -> None:
        self._outputs = outputs
        self._abort: Abort

    def connect(self, abort: Abort) -> None:
        """Give it AsyncLLM's `abort`, for ids inside the engines; AsyncLLM comes later."""
        self._abort = abort

    async def end(self, request_id: str, answer: Answer, refusal: Refusal) -> None:
        """End this request, and all that belongs to the same answer."""
        if not answer.refuse(refusal):
            last = EngineCoreOutput(request_id, [], finish_reason=FinishReason.ERROR)
            self._outputs.put_nowait(EngineCoreOutputs(outputs=[last]))
            return
        # As if the client had left: it counts in none of vLLM's latencies, which an output would.
        request_ids = [request_id, *answer.running]
        await self._abort(request_ids)
        await self._abort(list(_parents(request_ids)))


def _parents(request_ids: Iterable[str]) -> Iterator[str]:
    """The requests that vLLM made these of: with n > 1 they are called `<index>_<parent>`."""
    for request_id in request_ids:
        index, _, parent = request_id.partition("_")
        if index.isdigit():
            yield parent
