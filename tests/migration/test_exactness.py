"""Whatever a request asks of sampling, and whenever it moves, it goes on as if it had not moved.

Two real engines; all features run at once on one of them, and each request moves by itself.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output.utils import choice_as_grammar

from migration.protocol import source as protocol
from migration.snapshot import Submission
from tests.migration.engines import Engine, Move, history, submission

SEEDED = {"temperature": 1.0, "seed": 11}
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 30}, "people": {"type": "integer"}},
    "required": ["city", "people"],
}
CHOICES = ["yes " * 14 + "no", "yes " * 7 + "no " * 10, "no " * 20]
FEATURES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": SEEDED,
    "top-k, top-p, min-p": SEEDED | {"top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "penalties": {"presence_penalty": 1.5, "frequency_penalty": 0.7, "repetition_penalty": 1.2},
    "seeded penalties": SEEDED | {"presence_penalty": 1.9, "frequency_penalty": 0.5},
    "min tokens": {"min_tokens": 50, "stop_token_ids": list(range(60, 100))},
    "stop token ids": {"stop_token_ids": list(range(97, 99)), "min_tokens": 30},
    "max tokens": {"max_tokens": 50},
    "bad words": {"bad_words": [chr(letter) for letter in range(40, 70)]},
    "logit bias": {"logit_bias": {70: 4.0, 71: -100.0}},
    "allowed tokens": SEEDED | {"allowed_token_ids": list(range(40, 90))},
    "logprobs": {"logprobs": 3},
    "json": SEEDED | {"structured_outputs": StructuredOutputsParams(json=CITY)},
    "regex": SEEDED | {"structured_outputs": StructuredOutputsParams(regex="([a-z]{3}-){12}end")},
    "choice": SEEDED
    # As the front end hands on {"choice": [...]}.
    | {"structured_outputs": StructuredOutputsParams(grammar=choice_as_grammar(CHOICES))},
}
CONTEXTS = {"short": 90, "long": 1000}

MOVES = {
    "while waiting or in prefill": [0],
    "early": [1],
    "late": [36],
    "there and back": [3, 20],
    "many times": [2, 8, 14, 20, 26, 32],
}
"""When a request moves: each time it has so many tokens."""

MOST_OF_THEM = len(FEATURES) - 3
"""Some stop before they are to move."""

ENGINE = {"kv_cache_memory_bytes": 72 << 20, "max_num_seqs": 32}


@pytest.fixture(scope="module")
def pair(tiny_llama: Path) -> tuple[Engine, Engine]:
    return Engine(str(tiny_llama), **ENGINE), Engine(str(tiny_llama), **ENGINE)


@pytest.fixture
def engines(pair: tuple[Engine, Engine]) -> Iterator[tuple[Engine, Engine]]:
    """Both must be clean after each test: every block, request and runner entry came back."""
    yield pair
    for engine in pair:
        engine.run_out()
        assert engine.is_clean


@pytest.fixture(scope="module")
def unmoved(pair: tuple[Engine, Engine]) -> dict[str, dict[str, Any]]:
    """What each feature's request says, by context, where nothing moves."""
    return {context: run(pair, prompts(length), []) for context, length in CONTEXTS.items()}


def prompts(length: int) -> dict[str, list[int]]:
    """One of its own for each feature."""
    rng = random.Random(length)
    return {feature: rng.choices(range(32, 127), k=length) for feature in FEATURES}


def run(
    engines: tuple[Engine, Engine],
    prompts: dict[str, list[int]],
    hops: list[int],
    **move: Any,
) -> dict[str, Any]:
    """Run all features at once, each request moving as it comes to the next of `hops`."""
    here = engines[0]
    requests = {name: submission(prompts[name], **FEATURES[name]) for name in FEATURES}
    for request in requests.values():
        here.seam.add(request)
    here.step()
    homes = dict.fromkeys(requests, 0)
    while any(engine.core.scheduler.has_requests() for engine in engines):
        for name, request in requests.items():
            hop_if_due(engines, request, homes, name, hops, move)
        for engine in engines:
            engine.step()
    if hops:
        assert sum(hopped > 0 for hopped in homes.values()) >= MOST_OF_THEM, homes
    return {name: said(request) for name, request in requests.items()}


def hop_if_due(
    engines: tuple[Engine, Engine],
    request: Submission,
    homes: dict[str, int],
    name: str,
    hops: list[int],
    options: dict[str, Any],
) -> None:
    """Move the request to the other engine if it has come so far, and has not ended."""
    emitted = history[request.request_id]
    done = homes[name]
    tokens = sum(len(output.new_token_ids) for output in emitted)
    if done == len(hops) or tokens < hops[done] or (emitted and emitted[-1].finished):
        return
    move = Move(engines[done % 2], engines[1 - done % 2], request, **options)
    end = move.run()
    ended_meanwhile = protocol.End("aborted", "the request has finished")
    assert end.outcome == "completed" or end == ended_meanwhile
    homes[name] += end.outcome == "completed"


def said(request: Submission) -> list[Any]:
    """Tokens and ends, in the order in which the engines emitted them."""
    outputs = history[request.request_id]
    tokens = [token for output in outputs for token in output.new_token_ids]
    alternatives = [
        output.new_logprobs.logprob_token_ids.tolist() for output in outputs if output.new_logprobs
    ]
    return [tokens, alternatives, outputs[-1].finish_reason, outputs[-1].stop_reason]


def differing(got: dict[str, Any], expected: dict[str, Any]) -> set[str]:
    return {feature for feature in FEATURES if got[feature] != expected[feature]}


@pytest.mark.parametrize("moves", MOVES)
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_moved_request_goes_on_exactly(
    engines: tuple[Engine, Engine],
    unmoved: dict[str, dict[str, Any]],
    context: str,
    moves: str,
) -> None:
    got = run(engines, prompts(CONTEXTS[context]), MOVES[moves])
    assert differing(got, unmoved[context]) == set()


def test_without_the_copy_they_differ(
    engines: tuple[Engine, Engine], unmoved: dict[str, dict[str, Any]]
) -> None:
    """The control: the suite notices lost bytes. (A choice has one way to go on.)"""
    got = run(engines, prompts(CONTEXTS["short"]), MOVES["early"], copy=False)
    assert differing(got, unmoved["short"]) >= set(FEATURES) - {"choice", "json", "regex"}


def test_without_the_sampler_state_they_differ(
    engines: tuple[Engine, Engine],
    unmoved: dict[str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The control: the suite notices a generator that starts anew, and forgotten outputs."""
    for engine in engines:
        seed = engine.worker.mig_seed
        monkeypatch.setattr(
            engine.worker, "mig_seed", lambda new, outputs, rng, seed=seed: seed(new, [], None)
        )
    got = run(engines, prompts(CONTEXTS["short"]), MOVES["there and back"])
    notice = {"seeded", "penalties", "min tokens", "top-k, top-p, min-p"}
    assert differing(got, unmoved["short"]) >= notice
