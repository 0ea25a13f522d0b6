"""Whatever a request asks of sampling, and whenever it moves, it goes on as if it had not moved.

Two real engines; all features run at once on one of them, and each request moves by itself.
"""

from typing import Any

import pytest

from migration.protocol import source as protocol
from migration.snapshot import Submission
from tests.migration.engines import Engine, Move, history, submission
from tests.migration.features import (
    CONTEXTS,
    FEATURES,
    MOST_OF_THEM,
    ONE_WAY_TO_GO_ON,
    Said,
    differing,
    prompts,
    said,
)

MOVES = {
    "while waiting or in prefill": [0],
    "early": [1],
    "late": [36],
    "there and back": [3, 20],
    "many times": [2, 8, 14, 20, 26, 32],
}
"""When a request moves: each time it has so many tokens."""


@pytest.fixture(scope="module")
def unmoved(pair: tuple[Engine, Engine]) -> dict[str, dict[str, Said]]:
    """What each feature's request says, by context, where nothing moves."""
    return {context: run(pair, prompts(length), []) for context, length in CONTEXTS.items()}


def run(
    engines: tuple[Engine, Engine],
    prompts: dict[str, list[int]],
    hops: list[int],
    **move: Any,
) -> dict[str, Said]:
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


@pytest.mark.parametrize("moves", MOVES)
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_moved_request_goes_on_exactly(
    engines: tuple[Engine, Engine],
    unmoved: dict[str, dict[str, Said]],
    context: str,
    moves: str,
) -> None:
    got = run(engines, prompts(CONTEXTS[context]), MOVES[moves])
    assert differing(got, unmoved[context]) == set()


def test_without_the_copy_they_differ(
    engines: tuple[Engine, Engine], unmoved: dict[str, dict[str, Said]]
) -> None:
    """The control: the suite notices lost bytes."""
    got = run(engines, prompts(CONTEXTS["short"]), MOVES["early"], copy=False)
    assert differing(got, unmoved["short"]) >= set(FEATURES) - ONE_WAY_TO_GO_ON - {"json", "regex"}


def test_without_the_sampler_state_they_differ(
    engines: tuple[Engine, Engine],
    unmoved: dict[str, dict[str, Said]],
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
