"""The requests of a chaos run: a pool of them, whose copies must all come out alike."""

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from load_tests.client import Completion

Workload = Literal["emulated", "vllm"]

MODEL = "tiny-llama"
POOL = 40
PROMPT_TOKENS, OUTPUT_TOKENS = (50, 600), (100, 400)

PROBED = (32, 64, 128, 256, 384, 512, 640, 768, 896, 1024)
"""Lengths of prompts whose prefill is timed: those of all requests of a pool at any point."""

PRINTABLE = range(32, 127)
"""The tiny model's tokens for ASCII; random ones outside of it make no text."""

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 60},
        "streets": {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 4},
    },
    "required": ["city", "streets"],
}
WORDS = "([a-z]{3}-){40}end"


def pool(workload: Workload, seed: int, count: int = POOL) -> list[Completion]:
    """Requests of mixed length; for vLLM of all kinds of sampling, one after the other."""
    rng = random.Random(f"pool/{seed}")
    return [_request(rng, _sampling(rng, number, workload)) for number in range(count)]


def copy_of(request: Completion, name: str) -> Completion:
    """The same request under a name, by which the admin API knows it."""
    return replace(request, headers={"X-Request-Id": name})


def probe(tokens: int, seed: int) -> Completion:
    """A prompt of so many tokens, and the one token that its prefill makes."""
    rng = random.Random(f"probe/{tokens}/{seed}")
    return Completion(MODEL, "", 1, extra=_body(rng.choices(PRINTABLE, k=tokens)))


def length(request: Completion) -> int:
    """Tokens of its prompt."""
    return len(request.extra["prompt"])


def _request(rng: random.Random, sampling: Mapping[str, Any]) -> Completion:
    prompt = rng.choices(PRINTABLE, k=rng.randint(*PROMPT_TOKENS))
    return Completion(MODEL, "", rng.randint(*OUTPUT_TOKENS), extra={**_body(prompt), **sampling})


def _body(prompt: list[int]) -> dict[str, Any]:
    return {"prompt": prompt, "return_token_ids": True}


def _sampling(rng: random.Random, number: int, workload: Workload) -> dict[str, Any]:
    """Greedy, seeded, seeded with penalties, JSON, a regular expression; the emulated engine looks
    at none of that.
    """
    if workload == "emulated":
        return {}
    seeded = {"temperature": 1.0, "seed": rng.randrange(1 << 30), "top_p": 0.95}
    penalties = {"presence_penalty": 1.2, "frequency_penalty": 0.5, "repetition_penalty": 1.1}
    kinds: tuple[dict[str, Any], ...] = (
        {},
        seeded,
        seeded | penalties,
        seeded | {"structured_outputs": {"json": CITY}, "ignore_eos": False},
        seeded | {"structured_outputs": {"regex": WORDS}, "ignore_eos": False},
    )
    return kinds[number % len(kinds)]
