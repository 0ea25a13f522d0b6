"""On two real engines: what continues elsewhere is the same request, and nothing is left behind."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.pooling_params import PoolingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from deployments.engine_config import warm_up
from migration.protocol.messages import Refused
from migration.snapshot import CannotMove, Snapshot, Submission, UnknownRequest
from tests.migration.engines import Engine, history, move, reserve, revive, submission

PROMPT = random.Random(3).choices(range(32, 127), k=90)
LONG = random.Random(4).choices(range(32, 127), k=1500)


@pytest.fixture(scope="module")
def pair(tiny_llama: Path) -> tuple[Engine, Engine]:
    return Engine(str(tiny_llama)), Engine(str(tiny_llama))


def alone(engine: Engine, prompt: list[int], **sampling: Any) -> Submission:
    """Run the request where nothing moves, and leave no cached blocks to the next one."""
    request = submission(prompt, **sampling)
    engine.seam.add(request)
    engine.run_out()
    engine.core.reset_prefix_cache()
    return request


def emitted(request: Submission) -> list[Any]:
    """Tokens and ends, in the order in which the engines emitted them."""
    return [
        (out.new_token_ids, out.finish_reason, out.stop_reason)
        for out in history[request.request_id]
    ]


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "seeded"]
)
def test_a_request_moves_in_the_middle_of_its_prefill(
    engines: tuple[Engine, Engine], sampling: dict[str, Any]
) -> None:
    here, there = engines
    expected = emitted(alone(here, LONG, **sampling))
    request = submission(LONG, **sampling)

    here.seam.add(request)
    here.step()
    here.step()
    assert not here.tokens(request.request_id)
    blocks = move(here, there, request, steps=0)
    there.run_out()

    assert blocks == 2 * 256 // 32
    assert emitted(request) == expected


def test_a_waiting_request_moves_without_blocks(engines: tuple[Engine, Engine]) -> None:
    here, there = engines
    expected = emitted(alone(here, PROMPT))
    hogs = [submission([65 + i] * 40, max_tokens=30) for i in range(8)]
    for hog in hogs:
        here.seam.add(hog)
    here.step()
    request = submission(PROMPT)
    here.seam.add(request)
    here.step()

    assert move(here, there, request) == 0
    there.run_out()

    assert emitted(request) == expected


def test_blocks_that_the_destination_has_cached_are_not_copied(
    engines: tuple[Engine, Engine],
) -> None:
    here, there = engines
    expected = emitted(alone(here, LONG))
    there.seam.add(submission(LONG, max_tokens=1))
    there.run_out()
    request = submission(LONG)

    here.seam.add(request)
    here.run_until(request.request_id, 10)
    blocks = move(here, there, request)
    there.run_out()

    assert blocks == 2  # 1,509 tokens fill 47 blocks and a bit; 46 of them were cached
    assert emitted(request) == expected


def test_without_the_copy_the_output_differs(engines: tuple[Engine, Engine]) -> None:
    """The control of all the tests above."""
    here, there = engines
    expected = emitted(alone(here, PROMPT))
    request = submission(PROMPT)

    here.seam.add(request)
    here.run_until(request.request_id, 20)
    move(here, there, request, copy=False)
    there.run_out()

    assert emitted(request) != expected


def test_without_the_sampler_state_the_output_differs(
    engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control for seeded requests: the generator's state travels."""
    here, there = engines
    sampling = {"temperature": 1.0, "seed": 11}
    expected = emitted(alone(here, PROMPT, **sampling))
    request = submission(PROMPT, **sampling)

    here.seam.add(request)
    here.run_until(request.request_id, 20)
    fresh = here.worker.model_runner.requests[request.request_id].generator.manual_seed(11)
    assert fresh is not None
    move(here, there, request)
    there.run_out()

    assert emitted(request) != expected


def test_a_move_given_up_after_parking_changes_nothing(engines: tuple[Engine, Engine]) -> None:
    here, there = engines
    expected = emitted(alone(here, PROMPT))
    request = submission(PROMPT)

    here.seam.add(request)
    here.run_until(request.request_id, 20)
    reservation = reserve(here, there, request)
    parked = here.seam.park(request)
    assert parked is not None
    here.step()
    assert len(here.tokens(request.request_id)) == 20
    there.seam.cancel(reservation)
    here.seam.unpark(request.request_id)
    here.run_out()

    assert emitted(request) == expected


def test_a_parked_request_can_be_dropped(engines: tuple[Engine, Engine]) -> None:
    here, _ = engines
    request = submission(PROMPT)
    here.seam.add(request)
    here.run_until(request.request_id, 5)

    parked = here.seam.park(request)
    here.seam.drop(request.request_id)

    assert parked is not None
    here.seam.unpark(request.request_id)
    assert request.request_id not in here.seam.requests()


def test_a_finished_request_is_unknown(engines: tuple[Engine, Engine]) -> None:
    here, _ = engines
    request = submission(PROMPT, max_tokens=2)
    here.seam.add(request)
    here.run_out()

    with pytest.raises(UnknownRequest):
        here.seam.park(request)


def test_prompt_logprobs_hold_a_request_until_its_first_token(
    engines: tuple[Engine, Engine],
) -> None:
    here, _ = engines
    request = submission(LONG, prompt_logprobs=1)
    here.seam.add(request)
    here.step()

    with pytest.raises(CannotMove, match="prompt logprobs"):
        here.seam.inspect(request)


def test_no_room_is_refused_and_changes_nothing(engines: tuple[Engine, Engine]) -> None:
    here, there = engines
    hog = submission([7] * 3900, max_tokens=100)
    there.seam.add(hog)
    there.run_until(hog.request_id, 1)
    free = there.seam.blocks_free
    request = submission([70] * 2200)
    here.seam.add(request)
    here.run_until(request.request_id, 1)

    answer = there.seam.reserve(here.seam.inspect(request).snapshot, 64, keep_free=0)

    assert isinstance(answer, Refused)
    assert "no room" in answer.reason
    assert there.seam.blocks_free == free
    for engine, one in ((here, request), (there, hog)):
        engine.seam.drop(one.request_id)


def test_a_destination_keeps_room_for_those_it_has(engines: tuple[Engine, Engine]) -> None:
    here, there = engines
    request = submission(PROMPT)
    here.seam.add(request)
    here.run_until(request.request_id, 1)
    snapshot = here.seam.inspect(request).snapshot
    needed = there.seam.blocks_for(snapshot.computed_tokens + 64)

    room = there.seam.blocks_total - needed
    answer = there.seam.reserve(snapshot, snapshot.computed_tokens + 64, keep_free=room)

    assert isinstance(answer, Refused)


def test_a_full_batch_is_refused(engines: tuple[Engine, Engine]) -> None:
    here, there = engines
    for i in range(8):
        there.seam.add(submission([65 + i] * 4, max_tokens=20))
    there.step()
    request = submission(PROMPT)
    here.seam.add(request)
    here.run_until(request.request_id, 1)

    answer = there.seam.reserve(here.seam.inspect(request).snapshot, 64, keep_free=0)

    assert isinstance(answer, Refused)
    assert "batch is full" in answer.reason


def test_a_seeded_request_with_a_chunked_prefill_does_not_kill_the_engine(
    engines: tuple[Engine, Engine],
) -> None:
    """The vLLM bug that `seeded_prefill` works around."""
    here, _ = engines
    request = submission(LONG, temperature=1.0, seed=1, max_tokens=4)

    here.seam.add(request)
    here.run_out()

    assert len(here.tokens(request.request_id)) == 4


def test_a_reservation_grows_up_to_the_longest_request_and_not_beyond(
    engines: tuple[Engine, Engine],
) -> None:
    here, there = engines
    request = submission([70] * 2000)
    here.seam.add(request)
    here.run_until(request.request_id, 1)
    reservation = reserve(here, there, request)

    for tokens in (2500, 4096, 4100):
        assert there.seam.extend(reservation, tokens, keep_free=0) is None
    assert there.seam.capacity(reservation) == 4096
    assert len(set(reservation.block_ids)) == 4096 // 32

    there.seam.cancel(reservation)
    here.seam.drop(request.request_id)


@pytest.mark.parametrize(
    "others", [[PROMPT] * 8, [LONG * 2] * 2], ids=["all places are taken", "all blocks are in use"]
)
def test_a_revived_request_waits_its_turn_on_a_full_engine(
    engines: tuple[Engine, Engine], others: list[list[int]]
) -> None:
    here, there = engines
    expected = emitted(alone(here, LONG))
    lost = submission(LONG)
    here.seam.add(lost)
    here.run_until(lost.request_id, 20)
    here.seam.drop(lost.request_id)
    hogs = [submission([number, *prompt]) for number, prompt in enumerate(others)]
    for hog in hogs:
        there.seam.add(hog)
    there.run_until(hogs[-1].request_id, 1)

    again = revive(there, lost)
    there.step()
    assert again.request_id in [request.request_id for request in there.seam.waiting()]
    there.run_out()

    assert emitted(again) == expected


IMAGE = MultiModalFeatureSpec(
    data=None, modality="image", identifier="cat", mm_position=PlaceholderRange(0, 4)
)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.parametrize(
    "asked",
    [
        {"mm_features": [IMAGE]},
        {"prompt_token_ids": None, "prompt_embeds": torch.zeros(1, 4)},
        {"sampling_params": None, "pooling_params": PoolingParams(task="embed")},
        {"resumable": True},
    ],
    ids=["an image", "embeddings", "pooling", "streamed input"],
)
def test_what_is_more_than_its_tokens_is_not_revived(
    engines: tuple[Engine, Engine], asked: dict[str, Any]
) -> None:
    here, _ = engines
    request = submission(PROMPT)
    wire = MsgpackDecoder(EngineCoreRequest).decode(request.request)
    for name, value in asked.items():
        setattr(wire, name, value)
    (encoded,) = MsgpackEncoder().encode(wire)

    with pytest.raises(CannotMove, match="continued"):
        here.seam.revive(Snapshot(replace(request, request=encoded), (65, 66)))


@pytest.mark.parametrize("setting", ["use_fp64_gumbel", "speculation"])
def test_a_seed_whose_draws_cannot_be_counted_is_not_revived(
    engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    here, _ = engines
    if setting == "speculation":
        monkeypatch.setattr(here.core, "use_spec_decode", True)
    else:
        monkeypatch.setattr(here.core.vllm_config.model_config, setting, True)

    here.seam.revive(Snapshot(submission(PROMPT), (65, 66)))
    with pytest.raises(CannotMove, match="seeded requests cannot be continued exactly"):
        here.seam.revive(Snapshot(submission(PROMPT, seed=1, temperature=1.0), (65, 66)))


def test_an_engine_that_is_warm_holds_nothing_of_it(engines: tuple[Engine, Engine]) -> None:
    here, _ = engines
    warm_up(here.core)
    here.step()
    assert here.is_clean
