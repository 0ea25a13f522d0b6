"""What cannot go on elsewhere exactly is refused, and what was taken for it is given back."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from vllm.sampling_params import StructuredOutputsParams

from migration.engine_seam import Reservation
from migration.protocol.messages import Refused
from migration.resume import resume
from migration.snapshot import CannotMove, Snapshot
from tests.migration.engines import Engine, submission
from tests.migration.fakes import Steps

PROMPT = list(range(65, 90))
LONG = [66] * 1500


@pytest.fixture(scope="module")
def engine(tiny_llama: Path) -> Engine:
    return Engine(str(tiny_llama))


def test_an_engine_with_a_kv_connector_hands_nothing_over_and_takes_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connector must hear of each request when it comes, and would fail on others."""
    request = submission(PROMPT)
    engine.seam.add(request)
    with monkeypatch.context() as patch:
        patch.setattr(engine.core.scheduler, "connector", object())
        with pytest.raises(CannotMove, match="KV connector"):
            engine.seam.inspect(request)
        with pytest.raises(CannotMove, match="KV connector"):
            engine.seam.revive(Snapshot(submission(PROMPT), (65, 66)))
    engine.run_out()


def test_a_thinking_budget_is_not_moved_where_the_runner_counts_it_step_by_step(
    engine: Engine,
) -> None:
    request = submission(PROMPT, thinking_token_budget=5)
    engine.seam.add(request)
    with pytest.raises(CannotMove, match="thinking_token_budget"):
        engine.seam.inspect(request)
    engine.seam.drop(request.request_id)


def said(request: Any, text: str) -> Snapshot:
    return Snapshot(request, tuple(text.encode()))


def test_tokens_that_the_grammar_does_not_accept_here_are_not_gone_on_from(engine: Engine) -> None:
    """Another backend may have made them; the matcher would stay behind, and allow anything."""
    strict = submission(PROMPT, structured_outputs=StructuredOutputsParams(regex="(ab)+c"))
    with pytest.raises(CannotMove, match="does not accept"):
        asyncio.run(resume(Steps(), engine.seam, said(strict, "abb"), timeout_s=30))
    assert engine.is_clean


def test_a_grammar_that_fails_to_compile_here_is_not_gone_on_with(engine: Engine) -> None:
    request = submission(PROMPT, structured_outputs=StructuredOutputsParams(regex="(ab)+c"))
    reservation = engine.seam.revive(said(request, "ab"))
    structured = reservation.request.structured_output_request
    assert structured is not None
    structured._grammar = TimeoutError("it took too long")  # type: ignore[assignment]
    with pytest.raises(CannotMove, match="does not compile here: it took too long"):
        engine.seam.install(reservation, said(request, "ab"))
    assert engine.is_clean


def test_prefills_that_do_not_fit_together_do_not_move_in_together(engine: Engine) -> None:
    """Each would hold what the other one needs, and both would wait for ever."""
    seam = engine.seam
    fitting = seam.blocks_total // seam.blocks_for(len(LONG))
    taken: list[Reservation] = []
    while True:
        snapshot = Snapshot(submission(LONG), computed_tokens=32)
        answer = seam.reserve(snapshot, 64, keep_free=0)
        if isinstance(answer, Refused):
            break
        taken.append(answer)
    assert len(taken) == fitting
    assert seam.extend(taken[0], len(LONG), keep_free=0) is None, "what is its own it may take"
    for each in taken:
        seam.cancel(each)
    assert engine.is_clean
