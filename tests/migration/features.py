"""Whatever a request can ask of sampling, and how to tell whether it got the same."""

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams
from vllm.v1.structured_output.utils import choice_as_grammar

from migration.snapshot import Submission
from tests.migration.engines import history

SEEDED = {"temperature": 1.0, "seed": 11}
PENALTIES = {"presence_penalty": 1.5, "frequency_penalty": 0.7, "repetition_penalty": 1.2}
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 30}, "people": {"type": "integer"}},
    "required": ["city", "people"],
}
CHOICES = ["yes " * 14 + "no", "yes " * 7 + "no " * 10, "no " * 20]
FEATURES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy with a seed": {"seed": 11},
    "seeded": SEEDED,
    "top-k, top-p, min-p": SEEDED | {"top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "penalties": PENALTIES,
    "seeded penalties": SEEDED | PENALTIES,
    "min tokens": {"min_tokens": 50, "stop_token_ids": list(range(60, 100))},
    "stop token ids": {"stop_token_ids": list(range(97, 99)), "min_tokens": 30},
    "max tokens": {"max_tokens": 50},
    "bad words": {"bad_words": [chr(letter) for letter in range(40, 70)]},
    "logit bias": {"logit_bias": {70: 4.0, 71: -100.0}},
    "allowed tokens": SEEDED | {"allowed_token_ids": list(range(40, 90))},
    "logprobs": {"logprobs": 3},
    "seeded logprobs": SEEDED | {"logprobs": 3},
    "json": SEEDED | {"structured_outputs": StructuredOutputsParams(json=CITY)},
    "regex": SEEDED | {"structured_outputs": StructuredOutputsParams(regex="([a-z]{3}-){12}end")},
    "choice": SEEDED
    # As the front end hands on {"choice": [...]}.
    | {"structured_outputs": StructuredOutputsParams(grammar=choice_as_grammar(CHOICES))},
    "repetition": {
        "allowed_token_ids": [65],
        "repetition_detection": RepetitionDetectionParams(1, 1, min_count=45),
    },
}
ONE_WAY_TO_GO_ON = {"choice", "repetition"}
"""Their tokens say nothing about what was lost."""

CONTEXTS = {"short": 90, "long": 1000}
"""Tokens of the prompts: a long one is prefilled in four chunks."""

MOST_OF_THEM = len(FEATURES) - 4
"""Some stop before anything is to happen to them."""

ENGINE = {"kv_cache_memory_bytes": 96 << 20, "max_num_seqs": 32}
"""Holds all of them at once."""

CLOSE = 1e-4
"""KV that was computed in another batch differs in its last digits."""


@dataclass(frozen=True, slots=True)
class Said:
    """What the engines emitted for a request, in order."""

    tokens: list[int]
    alternatives: list[Any]
    logprobs: list[float]
    prompt_logprobs: int
    ends: list[Any]


def said(request: Submission) -> Said:
    """By whichever engines, and under whichever ids."""
    outputs = history[request.request_id]
    told = [output.new_logprobs for output in outputs if output.new_logprobs]
    return Said(
        tokens=[token for output in outputs for token in output.new_token_ids],
        alternatives=[logprobs.logprob_token_ids.tolist() for logprobs in told],
        logprobs=[value for logprobs in told for value in logprobs.logprobs.flatten().tolist()],
        prompt_logprobs=sum(out.new_prompt_logprobs_tensors is not None for out in outputs),
        ends=[(out.finish_reason, out.stop_reason) for out in outputs if out.finished],
    )


def differing(got: dict[str, Said], expected: dict[str, Said]) -> set[str]:
    """The features whose requests did not say the same."""
    return {feature for feature in expected if not _same(got[feature], expected[feature])}


def _same(one: Said, other: Said) -> bool:
    if replace(one, logprobs=[]) != replace(other, logprobs=[]):
        return False
    return one.logprobs == pytest.approx(other.logprobs, abs=CLOSE)


def prompts(length: int) -> dict[str, list[int]]:
    """One of its own for each feature."""
    rng = random.Random(length)
    return {feature: rng.choices(range(32, 127), k=length) for feature in FEATURES}
