"""A request whose instance was lost goes on from its tokens alone as if it had not been.

Two real engines; all features run at once on one of them, and each request is lost by itself.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import MsgpackDecoder

from migration.resume import resume
from migration.snapshot import CannotMove, Snapshot, Submission
from tests.migration.engines import Engine, history, renewed, revive, submission
from tests.migration.fakes import Steps
from tests.migration.features import (
    FEATURES,
    MOST_OF_THEM,
    SEEDED,
    Said,
    differing,
    prompts,
    said,
)

ASKED = FEATURES | {"prompt logprobs": {"prompt_logprobs": 2}}
"""Prompt logprobs come with the first token, and must not come again."""

RANDOM = {feature for feature, sampling in ASKED.items() if SEEDED.items() <= sampling.items()}
GRAMMARS = {"json", "regex", "choice"}

CONTEXTS = {"short": 90, "longer than a step": 600}
"""Tokens of the prompts."""

LOSSES = {
    "after its first token": [1],
    "after a few": [5],
    "after many": [36],
    "on either engine": [3, 20, 40],
}
"""When a request is lost: each time it has so many tokens."""

GoOn = Callable[[Engine, Submission], Submission]


@pytest.fixture(scope="module")
def undisturbed(pair: tuple[Engine, Engine]) -> dict[str, dict[str, Said]]:
    """What each feature's request says, by context, where nothing is lost."""
    return {context: run(pair, context, []) for context in CONTEXTS}


def run(
    engines: tuple[Engine, Engine], context: str, losses: list[int], go_on: GoOn = revive
) -> dict[str, Said]:
    """Run all features at once; each request is lost as it comes to the next of `losses`.

    It goes on, by `go_on`, on the other engine.
    """
    requests = start(engines[0], context)
    lost = dict.fromkeys(requests, 0)
    while any(engine.core.scheduler.has_requests() for engine in engines):
        for name, request in requests.items():
            if lost[name] < len(losses) and has_come_to(request, losses[lost[name]]):
                here, there = engines[lost[name] % 2], engines[1 - lost[name] % 2]
                here.seam.drop(request.request_id)
                requests[name] = go_on(there, request)
                lost[name] += 1
        for engine in engines:
            engine.step()
    if losses:
        assert sum(times > 0 for times in lost.values()) >= MOST_OF_THEM, lost
    return {name: said(request) for name, request in requests.items()}


def start(engine: Engine, context: str) -> dict[str, Submission]:
    """A request for each feature."""
    texts = prompts(CONTEXTS[context])
    texts["prompt logprobs"] = texts["logprobs"]
    requests = {name: submission(texts[name], **ASKED[name]) for name in ASKED}
    for request in requests.values():
        engine.seam.add(request)
    return requests


def has_come_to(request: Submission, tokens: int) -> bool:
    """Whether it has said so much, and more is to come."""
    outputs = history[request.request_id]
    return sum(len(out.new_token_ids) for out in outputs) >= tokens and not outputs[-1].finished


@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_lost_request_goes_on_exactly(
    engines: tuple[Engine, Engine],
    undisturbed: dict[str, dict[str, Said]],
    context: str,
    losses: str,
) -> None:
    got = run(engines, context, LOSSES[losses])
    assert differing(got, undisturbed[context]) == set()


@pytest.mark.parametrize("steps", [0, 1], ids=["where it waits", "in its prefill"])
def test_one_lost_again_before_its_next_token_goes_on_exactly(
    engines: tuple[Engine, Engine], undisturbed: dict[str, dict[str, Said]], steps: int
) -> None:
    def twice(engine: Engine, request: Submission) -> Submission:
        again = revive(engine, request)
        for _ in range(steps):
            engine.step()
        assert not engine.tokens(again.request_id)
        engine.seam.drop(again.request_id)
        return revive(engine, again)

    got = run(engines, "longer than a step", [12], twice)
    assert differing(got, undisturbed["longer than a step"]) == set()


# --- controls ------------------------------------------------------------------------------------


def test_with_a_generator_that_starts_anew_they_differ(
    engines: tuple[Engine, Engine], undisturbed: dict[str, dict[str, Said]]
) -> None:
    def fresh(engine: Engine, request: Submission) -> Submission:
        seed = engine.worker.mig_seed
        state = torch.Generator().manual_seed(SEEDED["seed"]).get_state().numpy().tobytes()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine.worker, "mig_seed", lambda new, said, _: seed(new, said, state))
            return revive(engine, request)

    changed = differing(run(engines, "short", [5], fresh), undisturbed["short"])
    assert RANDOM - GRAMMARS <= changed <= RANDOM


def test_with_the_outputs_taken_for_prompt_they_differ(
    engines: tuple[Engine, Engine], undisturbed: dict[str, dict[str, Said]]
) -> None:
    """What a front end could do that only submits requests again."""

    def resubmit(engine: Engine, request: Submission) -> Submission:
        again = renewed(request)
        wire = MsgpackDecoder(EngineCoreRequest).decode(request.request)
        tokens = said(request).tokens
        wire.request_id = again.request_id
        wire.prompt_token_ids += tokens
        wire.sampling_params.max_tokens -= len(tokens)
        engine.core.add_request(engine.core.preprocess_add_request(wire)[0])
        return again

    changed = differing(run(engines, "short", [5], resubmit), undisturbed["short"])
    assert changed >= {"penalties", "seeded penalties", "min tokens", "json", "regex", "seeded"}
    assert not changed & {"greedy", "logit bias", "logprobs"}


def test_with_a_grammar_that_starts_anew_they_differ(
    engines: tuple[Engine, Engine], undisturbed: dict[str, dict[str, Said]]
) -> None:
    def forgetful(engine: Engine, request: Submission) -> Submission:
        with pytest.MonkeyPatch.context() as patch:
            grammars = engine.core.structured_output_manager
            patch.setattr(grammars, "accept_tokens", lambda *_: True)
            return revive(engine, request)

    changed = differing(run(engines, "short", [5], forgetful), undisturbed["short"])
    assert changed == GRAMMARS


# --- beside exactness ----------------------------------------------------------------------------


def test_what_the_engine_has_cached_is_not_computed_again(engines: tuple[Engine, Engine]) -> None:
    here, there = engines
    prompt = prompts(1000)["greedy"]
    lost = submission(prompt)
    here.seam.add(lost)
    here.run_until(lost.request_id, 5)
    here.seam.drop(lost.request_id)
    there.seam.add(submission(prompt, max_tokens=1))
    there.run_out()

    again = revive(there, lost)
    there.step()

    assert len(there.tokens(again.request_id)) == 1, "in one step, where a prefill takes four"


def test_a_grammar_that_takes_too_long_to_compile_is_refused() -> None:
    """And nothing is installed."""
    reserved: Any = SimpleNamespace()
    seam: Any = SimpleNamespace(revive=lambda _: reserved, grammar=lambda _: Future())
    with pytest.raises(CannotMove, match="its grammar is still being compiled"):
        asyncio.run(resume(Steps(), seam, Snapshot(submission([1]), (2,)), timeout_s=0.01))
