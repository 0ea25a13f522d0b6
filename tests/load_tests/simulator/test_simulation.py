"""A small fleet under the virtual clock: every token arrives, each run is the same, moves help."""

import multiprocessing
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.config import load
from deployments.emulated.worker import EmulatedWorker
from load_tests import simulate
from load_tests.outcome import Served
from load_tests.scenario import load_scenario
from load_tests.simulator.client import VirtualClient
from load_tests.simulator.fleet import Simulation
from load_tests.simulator.network import Delays, VirtualLinks
from load_tests.traces.trace import TraceRequest
from migration.snapshot import MigrationRecord

LONG, SHORT = (200, 120), (20, 20)
ONE_SIDED = [TraceRequest(0.2 * n, *(SHORT if n % 2 else LONG)) for n in range(40)]
"""Round robin over two instances sends all long requests to the first."""

_rng = random.Random(7)
MIXED = [
    TraceRequest(0.2 * n, _rng.randint(1, 300), _rng.randint(1, 150), priority)
    for n, priority in enumerate(_rng.choices(["normal", "high"], k=40))
]


@dataclass
class Outcome:
    """Of a run; `tokens` are those that were delivered for a request, by their index."""

    duration: float
    served: list[Served]
    moves: list[MigrationRecord]
    tokens: Mapping[str, Mapping[int, int]]

    @property
    def moved(self) -> list[MigrationRecord]:
        return [move for move in self.moves if move.outcome == "completed"]

    @property
    def worst_ttft(self) -> float:
        return max(one.tokens[0] - one.arrival for one in self.served)


def play(args: Mapping[str, Any], trace: list[TraceRequest], **changes: Any) -> Outcome:
    config = load({**args, **changes})
    tokens: dict[str, dict[int, int]] = {f"r{n:06}": {} for n in range(len(trace))}
    deliver = VirtualClient.deliver

    def remember(self: VirtualClient, replica_id: str, first: int, output: Any) -> None:
        tokens[output.request_id].update(enumerate(output.new_token_ids, first))
        deliver(self, replica_id, first, output)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VirtualClient, "deliver", remember)
        simulation = Simulation(config, seed=0)
        duration = simulation.run(trace, lambda: None)
    return Outcome(duration, simulation.served, simulation.moves, tokens)


@pytest.fixture(scope="module")
def moving(args: dict[str, Any]) -> Outcome:
    return play(args, ONE_SIDED)


@pytest.fixture(scope="module")
def staying(args: dict[str, Any]) -> Outcome:
    return play(args, ONE_SIDED, migration={"enabled": False})


def test_every_request_gets_exactly_its_tokens(moving: Outcome, staying: Outcome) -> None:
    for outcome in (moving, staying):
        assert [one.error for one in outcome.served] == [""] * 40
        assert [len(one.tokens) for one in outcome.served] == [r.output_tokens for r in ONE_SIDED]
        assert [sorted(of) for of in outcome.tokens.values()] == [
            list(range(request.output_tokens)) for request in ONE_SIDED
        ]


def test_tokens_arrive_in_order_after_their_request(moving: Outcome) -> None:
    for one in moving.served:
        assert one.arrival < one.tokens[0]
        assert list(one.tokens) == sorted(one.tokens)
    assert [one.arrival for one in moving.served] == [request.at for request in ONE_SIDED]
    assert moving.duration == pytest.approx(max(one.tokens[-1] for one in moving.served), abs=0.1)


def test_each_run_is_the_same(args: dict[str, Any], moving: Outcome) -> None:
    assert play(args, ONE_SIDED) == moving


def test_what_is_drawn_at_random_is_so_too(args: dict[str, Any]) -> None:
    drawn = {"replicas": 3, "dispatch": "power_of_two"}
    assert play(args, MIXED, **drawn) == play(args, MIXED, **drawn)


def test_moved_requests_say_what_they_would_have_said(moving: Outcome, staying: Outcome) -> None:
    assert any(move.blocks for move in moving.moved)
    assert moving.tokens == staying.tokens


def test_blocks_that_did_not_arrive_are_noticed(
    args: dict[str, Any], staying: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""

    async def lose(self: VirtualLinks, group: str, block_ids: list[int]) -> int:
        return 0

    monkeypatch.setattr(VirtualLinks, "receive", lose)
    losing = play(args, ONE_SIDED)
    moved = {move.request_id for move in losing.moved if move.blocks}
    assert moved
    assert {name for name in moved if losing.tokens[name] == staying.tokens[name]} == set()


def test_nothing_moves_where_migration_is_off(moving: Outcome, staying: Outcome) -> None:
    assert staying.moves == []
    assert sum(one.moves for one in staying.served) == 0
    assert sum(one.moves for one in moving.served) == len(moving.moved) > 0


def test_moves_relieve_the_one_instance_that_is_overloaded(
    moving: Outcome, staying: Outcome
) -> None:
    away = [move for move in moving.moved if move.source == "i0000"]
    assert len(away) > 0.75 * len(moving.moved)
    assert moving.worst_ttft < staying.worst_ttft / 2


def test_preemptions_and_queues_are_told(staying: Outcome) -> None:
    preempted = [one for one in staying.served if one.preemptions]
    assert preempted
    assert all(one.preempted_s > 0 for one in preempted)
    assert all(one.queue_s <= one.tokens[0] - one.arrival for one in staying.served)
    assert max(one.queue_s for one in staying.served) > staying.worst_ttft / 2


@pytest.mark.parametrize("dispatch", ["freeness", "queue", "power_of_two", "round_robin"])
def test_three_instances_serve_whatever_comes(args: dict[str, Any], dispatch: str) -> None:
    outcome = play(args, MIXED, replicas=3, dispatch=dispatch)
    assert [one.error for one in outcome.served] == [""] * 40
    assert [len(of) for of in outcome.tokens.values()] == [r.output_tokens for r in MIXED]


def test_the_clock_is_the_real_one_again_afterwards(args: dict[str, Any]) -> None:
    clock = time.monotonic
    play(args, ONE_SIDED[:1])
    assert time.monotonic is clock


def test_a_scenario_says_what_is_simulated(profile: str, tiny_llama: Path, tmp_path: Path) -> None:
    scenario = {
        "trace": {"input": "S", "output": "S"},
        "requests": 3,
        "rates": [2.0],
        "instances": 2,
        "profile": "a10-llama-7b",
        "args": {"model": {"model_source": str(tiny_llama)}},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(scenario))
    run = simulate.run(load_scenario(str(tmp_path / "mine.yaml")), "llumnix", 2.0)
    assert (run.scenario, run.policy, run.rate, run.backend) == (
        "mine",
        "llumnix",
        2.0,
        "simulator",
    )
    assert [one.error for one in run.served] == [""] * 3
    assert {load.replica_id for load in run.samples[-1].loads} == {"i0000", "i0001"}


def test_a_request_that_no_instance_could_hold_is_refused_as_by_the_fleet(args):
    """With the fleet's own word; in an engine it would run for ever."""
    too_long, short = TraceRequest(0.0, 1000, 30), TraceRequest(0.1, *SHORT)
    first, second = play(args, [too_long, short]).served
    assert (first.error, second.error) == ("HTTP 400: an instance takes 1024 tokens", "")


def test_a_run_that_fails_ends_the_others(tmp_path: Path, tiny_llama: Path) -> None:
    scenario = {
        "trace": {"input": "S", "output": "S"},
        "requests": 400,
        "rates": [50.0],
        "args": {"model": {"model_source": str(tiny_llama)}},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(scenario))
    ended = multiprocessing.get_context("spawn").Value("q", 0)
    mine = load_scenario(str(tmp_path / "mine.yaml"))
    cells = [("no such policy", 50.0), ("llumnix", 50.0), ("infaas", 50.0)]
    with pytest.raises(KeyError, match="no such policy"):
        list(simulate.run_all(mine, cells, 1, ended))
    assert ended.value < 400


def test_an_engine_that_fails_ends_the_run(args, monkeypatch):
    def fail(self: Any, step: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(EmulatedWorker, "execute_model", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        play(args, MIXED)


AN_URGENT_ONE = [TraceRequest(0.01 * n, 60, 200) for n in range(8)]
AN_URGENT_ONE += [TraceRequest(0.5, 60, 100, "high"), TraceRequest(0.52, 60, 100)]
URGENT = "r000008"


@pytest.mark.parametrize("headroom_tokens", [0, 700])
def test_others_make_way_for_an_urgent_request_where_its_class_wants_headroom(
    args, headroom_tokens
):
    classes = {"high": {"priority": -10, "headroom_tokens": headroom_tokens}, "normal": {}}
    outcome = play(args, AN_URGENT_ONE, dispatch="freeness", priorities=classes)
    ended = next(one for one in outcome.served if one.request_id == URGENT).tokens[-1]
    moved = [move for move in outcome.moved if move.at < ended]
    assert URGENT not in {move.request_id for move in moved}
    assert len({move.source for move in moved}) == (1 if headroom_tokens else 0)
    assert [one.error for one in outcome.served] == [""] * 10


OVERLOAD = [TraceRequest(n / 20, 100, 60) for n in range(200)]
"""Ten seconds of twice what two small instances can serve."""


def queued_tokens(outcome: Outcome, at: float) -> int:
    """Prompt tokens of requests whose first token has not come to the ingress at that time."""
    on_its_way = Delays().deliver
    return sum(
        one.input_tokens
        for one in outcome.served
        if not one.error and one.arrival <= at < one.tokens[0] - on_its_way
    )


def test_under_overload_requests_are_refused_and_the_queue_stays_in_its_bounds(args):
    bounded = {"normal": {"max_queued_tokens": 2000}}
    outcome = play(args, OVERLOAD, dispatch="freeness", priorities=bounded)
    refused = [one for one in outcome.served if one.error]
    assert 50 < len(refused) < 100
    assert all(one.error.startswith("HTTP 429: the queue of class 'normal'") for one in refused)
    assert not any(one.tokens for one in refused)
    assert max(queued_tokens(outcome, request.at) for request in OVERLOAD) <= 2000
    kept = [one for one in outcome.served if not one.error]
    assert [len(one.tokens) for one in kept] == [60] * len(kept)


def test_under_overload_those_let_in_wait_about_as_long_as_they_may(args):
    outcomes = [
        play(args, OVERLOAD, dispatch="freeness", priorities={"normal": {"max_queue_s": max_s}})
        for max_s in (None, 1.0)
    ]
    unbounded, bounded = (
        max(one.tokens[0] - one.arrival for one in outcome.served if not one.error)
        for outcome in outcomes
    )
    assert unbounded > 4
    assert bounded < 2
