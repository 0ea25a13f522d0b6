"""Emulated engines under vLLM's own scheduler: tokens come from the KV, time from the profile."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine import EngineCoreEventType, FinishReason

from app.config import EmulatedEngine, EngineConfig
from deployments.emulated import worker
from deployments.emulated.profile import load_profile
from migration.snapshot import Submission
from migration.worker import MigrationWorker
from tests.migration.engines import Engine, history, move, revive, submission

A10 = load_profile("a10-llama-7b")
MOVES = {"in prefill": [0], "early": [1], "late": [40], "there and back": [3, 20]}
"""When a request moves: as soon as it has so many tokens."""


class Pace:
    """Takes no time; remembers what it was told of each step."""

    def __init__(self) -> None:
        self.steps: list[tuple[Any, bool]] = []

    def step(self, seconds: float, follows: bool) -> None:
        self.steps.append((pytest.approx(seconds), follows))

    def forget(self) -> None:
        self.steps = []


def emulated(model: Path, profile: str = "a10-llama-7b", **kwargs: Any) -> Engine:
    config = EngineConfig(emulated=EmulatedEngine(profile=profile))
    engine = Engine(str(model), config, **kwargs)
    engine.worker.pace = Pace()
    return engine


@pytest.fixture(scope="module")
def pair(tiny_llama: Path) -> tuple[Engine, Engine]:
    return emulated(tiny_llama), emulated(tiny_llama)


@pytest.fixture
def engines(pair: tuple[Engine, Engine]) -> Iterator[tuple[Engine, Engine]]:
    """Both must be clean after each test: every block, request and sequence is gone."""
    for engine in pair:
        engine.worker.pace.forget()
    yield pair
    for engine in pair:
        engine.run_out()
        assert engine.is_clean


@pytest.fixture
def here(engines: tuple[Engine, Engine]) -> Engine:
    return engines[0]


@pytest.fixture
def prompt(request: pytest.FixtureRequest) -> list[int]:
    """One of its own for each test, so that no block holds by chance what it should."""
    return prompt_of(300, request.node.name)


def prompt_of(length: int, seed: str) -> list[int]:
    return random.Random(seed).choices(range(32, 127), k=length)


def said(request: Submission) -> list[int]:
    """By whichever engines, in order."""
    return [token for output in history[request.request_id] for token in output.new_token_ids]


def alone(engine: Engine, prompt: list[int], **sampling: Any) -> list[int]:
    """What the request says where nothing else runs; no cached blocks are left to the next one."""
    request = submission(prompt, **sampling)
    engine.seam.add(request)
    engine.run_out()
    engine.core.reset_prefix_cache()
    return said(request)


def started(engine: Engine, prompt: list[int], tokens: int = 0, **sampling: Any) -> Submission:
    """A request that has said so much."""
    request = submission(prompt, **sampling)
    engine.seam.add(request)
    engine.run_until(request.request_id, tokens)
    return request


# --- tokens --------------------------------------------------------------------------------------


def test_every_instance_says_the_same(engines: tuple[Engine, Engine], prompt: list[int]) -> None:
    here, there = engines
    tokens = alone(here, prompt)
    assert len(tokens) == 60
    assert alone(there, prompt) == tokens


@pytest.mark.parametrize("position", [0, 150, 299])
def test_each_token_of_the_prompt_counts(here: Engine, prompt: list[int], position: int) -> None:
    other = list(prompt)
    other[position] ^= 1
    assert alone(here, other) != alone(here, prompt)


def test_a_batch_changes_nothing(here: Engine) -> None:
    prompts = [prompt_of(50 + 100 * n, f"batch {n}") for n in range(4)]
    expected = [alone(here, prompt) for prompt in prompts]
    requests = [started(here, prompt) for prompt in prompts]
    here.run_out()
    assert [said(request) for request in requests] == expected


def test_a_prefill_in_chunks_changes_nothing(
    here: Engine, tiny_llama: Path, prompt: list[int]
) -> None:
    chunked = emulated(tiny_llama, max_num_batched_tokens=256)
    assert alone(chunked, prompt * 3) == alone(here, prompt * 3)
    assert len(chunked.worker.pace.steps) == len(here.worker.pace.steps) + 900 // 256


def test_a_preemption_changes_nothing(here: Engine, tiny_llama: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.json"
    small.write_bytes(msgspec.json.encode(msgspec.structs.replace(A10, blocks=40)))
    crowded = emulated(tiny_llama, str(small))
    prompts = [prompt_of(200, name) for name in ("first", "second", "third")]
    requests = [started(crowded, prompt, max_tokens=200) for prompt in prompts]
    crowded.run_out()

    events = [e.type for r in requests for out in history[r.request_id] for e in out.events or ()]
    assert EngineCoreEventType.PREEMPTED in events
    expected = [alone(here, prompt, max_tokens=200) for prompt in prompts]
    assert [said(request) for request in requests] == expected
    assert crowded.is_clean


def test_a_cached_prefix_changes_nothing(here: Engine, prompt: list[int]) -> None:
    first = started(here, prompt, 60)
    here.worker.pace.forget()
    second = started(here, prompt, 60)
    assert here.worker.pace.steps[0] == (A10.step_s(300 - 288, 0, 12 * (288 + 6)), True)
    assert said(second) == said(first)


@pytest.mark.parametrize("moves", MOVES)
def test_a_moved_request_goes_on_exactly(
    engines: tuple[Engine, Engine], moves: str, prompt: list[int]
) -> None:
    here, there = engines
    prompt *= 10  # two chunks
    expected = alone(here, prompt)
    request = submission(prompt)
    here.seam.add(request)
    here.step()
    for tokens in MOVES[moves]:
        while len(said(request)) < tokens:
            here.step()
        move(here, there, request)
        here, there = there, here
    here.run_out()
    assert said(request) == expected


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_lost_request_goes_on_exactly(
    engines: tuple[Engine, Engine], tokens: int, prompt: list[int]
) -> None:
    here, there = engines
    prompt *= 10  # two chunks
    expected = alone(here, prompt)
    lost = started(here, prompt, tokens)
    here.seam.drop(lost.request_id)
    again = revive(there, lost)
    there.run_out()
    assert said(again) == expected


def test_without_the_copy_it_says_something_else(
    engines: tuple[Engine, Engine], prompt: list[int]
) -> None:
    """The control: a block that did not arrive is noticed."""
    here, there = engines
    expected = alone(here, prompt)
    request = started(here, prompt, 5)
    move(here, there, request, copy=False)
    there.run_out()
    assert said(request)[:5] == expected[:5]
    assert said(request) != expected


def test_two_blocks_in_each_other_s_place_are_noticed(here: Engine, prompt: list[int]) -> None:
    expected = alone(here, prompt)
    request = started(here, prompt, 5)
    one, other, *_ = here.seam.inspect(request).block_ids
    (kv,) = here.worker._mig_kv()
    kv[[one, other]] = kv[[other, one]]
    here.run_out()
    assert said(request)[:5] == expected[:5]
    assert said(request)[5:] != expected[5:]


# --- time ----------------------------------------------------------------------------------------


def test_a_prefill_takes_as_long_as_its_tokens_and_pairs(here: Engine, prompt: list[int]) -> None:
    started(here, prompt, 1)
    assert here.worker.pace.steps == [(A10.step_s(300, 0, 300 * 150), False)]


def test_decoding_takes_as_long_as_its_context(here: Engine) -> None:
    for length in (100, 200, 300):
        started(here, prompt_of(length, "decode"), max_tokens=9)
    here.step()
    here.worker.pace.forget()
    here.step()
    here.step()
    assert here.worker.pace.steps == [
        (A10.step_s(3, 100 + 200 + 300, 0), True),
        (A10.step_s(3, 101 + 201 + 301, 0), True),
    ]


def test_a_prefill_beside_decoding_takes_as_long_as_both(here: Engine, prompt: list[int]) -> None:
    started(here, prompt, 3)
    here.worker.pace.forget()
    started(here, prompt_of(2500, "chunked"), 1)
    assert here.worker.pace.steps == [
        (A10.step_s(2048, 302, 2047 * 2047 / 2), True),
        (A10.step_s(454, 303, 453 * (2047 + 453 / 2)), True),
    ]


def test_a_batch_follows_the_one_that_ended_before_it(tiny_llama: Path) -> None:
    one_by_one = emulated(tiny_llama, max_num_seqs=1)
    for name in ("first", "second"):
        one_by_one.seam.add(submission(prompt_of(100, name), max_tokens=2))
    one_by_one.run_out()
    assert [follows for _, follows in one_by_one.worker.pace.steps] == [False, True, True, True]


def test_a_batch_after_a_pause_does_not_follow(here: Engine, prompt: list[int]) -> None:
    for _ in range(2):
        started(here, prompt, max_tokens=2)
        here.run_out()
    assert [follows for _, follows in here.worker.pace.steps] == [False, True, False, True]


def test_a_request_that_stood_still_alone_does_not_follow(here: Engine, prompt: list[int]) -> None:
    request = started(here, prompt, 3)
    here.seam.park(request)
    here.step()
    here.worker.pace.forget()
    here.seam.unpark(request.request_id)
    here.step()
    assert [follows for _, follows in here.worker.pace.steps] == [False]


def test_blocks_arrive_once_their_tokens_had_the_time_to_travel(
    here: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[float | str] = []

    def receive(*_: Any) -> int:
        done.append("received")
        return 4096

    monkeypatch.setattr(MigrationWorker, "mig_receive", receive)
    monkeypatch.setattr(worker.time, "sleep", done.append)
    assert here.core.collective_rpc("mig_receive", args=("a>b", [5, 7, 9])) == [4096]
    assert done == [A10.copy_time_s(3 * 16), "received"]


def test_an_engine_holds_what_its_profile_says(here: Engine) -> None:
    seam = here.seam
    assert (seam.blocks_total, seam.block_size, seam.max_batch) == (851, 16, 256)
    assert here.core.vllm_config.model_config.max_model_len == 851 * 16


def test_a_wall_clock_s_drift_is_told_and_others_have_none(
    here: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert here.core.collective_rpc("emulation_drift") == [0.0]
    late = worker.WallPace(sleep=lambda _: None)
    late.busy, late.lost = 2.0, 0.5
    monkeypatch.setattr(here.worker, "pace", late)
    assert here.core.collective_rpc("emulation_drift") == [0.25]


# --- what an emulated model cannot do ------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "end"),
    [
        ({"logprobs": 3}, FinishReason.LENGTH),
        ({"prompt_logprobs": 3}, FinishReason.LENGTH),
        ({"structured_outputs": StructuredOutputsParams(regex="[0-9]{3}")}, FinishReason.ERROR),
    ],
    ids=["logprobs", "prompt logprobs", "structured output"],
)
def test_what_it_cannot_compute_harms_nobody_else(
    here: Engine, prompt: list[int], sampling: dict[str, Any], end: FinishReason
) -> None:
    expected = alone(here, prompt)
    other = started(here, prompt, 3)
    asks = started(here, prompt_of(80, "asks"), **sampling)
    here.run_out()
    assert history[asks.request_id][-1].finish_reason == end
    assert said(other) == expected
