"""The emulated model: its KV cache is real memory, and each token is computed from all of it.

A token's KV is a number drawn for its id. The next token is a weighted sum of the numbers found in
the request's blocks, one weight for each position: a block that is lost, stale, or in the wrong
place makes wrong tokens, as it would in attention.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.core.sched.output import SchedulerOutput

ALPHABET = 26
FIRST_LETTER = ord("a")
"""Output tokens are small letters where a token is a byte, so that streams can be looked at."""

Numbers = NDArray[np.int64]


@dataclass(slots=True)
class _Sequence:
    """What a model runner keeps of a request: its tokens so far and its blocks, in order."""

    tokens: list[int]
    blocks: Numbers


@dataclass(frozen=True, slots=True)
class Work:
    """One request's part of a step: `count` tokens from position `start` on.

    `token`: what it samples; None where its prompt is not complete yet.
    """

    request_id: str
    start: int
    count: int
    token: int | None


class Sequences:
    """The requests of one engine. `kv`: int64, (blocks, tokens of a block)."""

    def __init__(self, kv: torch.Tensor, vocabulary: int, max_tokens: int) -> None:
        self._kv: Numbers = kv.numpy()  # the same memory, which migration writes to as well
        self._slots = self._kv.reshape(-1)
        self._block_size = kv.shape[1]
        rng = np.random.default_rng(0)  # the same model on every instance
        self._value_of: Numbers = rng.integers(-(2**62), 2**62, vocabulary)
        self._weight_at: Numbers = rng.integers(-(2**62), 2**62, max_tokens) | 1
        self._live: dict[str, _Sequence] = {}

    def __len__(self) -> int:
        return len(self._live)

    def execute(self, step: SchedulerOutput) -> Iterator[Work]:
        """Do what the scheduler says: write the KV of each request's tokens, then sample."""
        self._take_in(step)
        starts = {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}
        cached = step.scheduled_cached_reqs
        starts.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for request_id, count in step.num_scheduled_tokens.items():
            start = starts[request_id]
            yield Work(request_id, start, count, self._advance(request_id, start, count))

    def _take_in(self, step: SchedulerOutput) -> None:
        """As vLLM's V1 model runner does in `_update_states`."""
        for request_id in step.finished_req_ids:
            self._live.pop(request_id, None)
        for new in step.scheduled_new_reqs:
            # vLLM sends a resumed request as a new one where it takes the runner for its V2.
            tokens = new.prefill_token_ids or new.prompt_token_ids or ()
            self._live[new.req_id] = _Sequence(list(tokens), _array(new.block_ids[0]))
        cached = step.scheduled_cached_reqs
        for request_id, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if request_id in cached.resumed_req_ids:
                assert blocks is not None
                tokens = list(cached.all_token_ids[request_id])
                self._live[request_id] = _Sequence(tokens, _array(blocks[0]))
            elif blocks is not None and blocks[0]:
                sequence = self._live[request_id]
                sequence.blocks = np.concatenate([sequence.blocks, _array(blocks[0])])

    def _advance(self, request_id: str, start: int, count: int) -> int | None:
        sequence = self._live[request_id]
        end = start + count
        positions = np.arange(start, end)
        slots = sequence.blocks[positions // self._block_size] * self._block_size
        slots += positions % self._block_size
        self._slots[slots] = self._value_of[sequence.tokens[start:end]]
        if end < len(sequence.tokens):
            return None
        token = self._sample(sequence, end)
        sequence.tokens.append(token)
        return token

    def _sample(self, sequence: _Sequence, context: int) -> int:
        used = sequence.blocks[: -(-context // self._block_size)]
        numbers = self._kv[used].reshape(-1)[:context]
        mixed = int(numbers @ self._weight_at[:context])  # wraps around, as it should
        return FIRST_LETTER + (mixed >> 33) % ALPHABET


def _array(blocks: Sequence[int]) -> Numbers:
    return np.array(blocks, dtype=np.int64)
