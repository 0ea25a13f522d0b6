"""What is judged and shown of streams between GPUs; no server, no GPU."""

import json
import sys
from argparse import Namespace

import pytest

from app import resources
from app.config import load
from load_tests import gpu_check
from load_tests.gpu_check import HEADING, Result, Run, overrides, requests, tokens_of
from load_tests.servers import ServerFailed

RECORD = {"bytes": 2_000_000_000, "stages": 3, "downtime_ms": 12.0}


def run(tokens, *moves, step=0.02):
    return Run(list(tokens), [step * n for n in range(len(tokens))], list(moves))


def result(name, *pairs):
    unmoved, moved = zip(*pairs, strict=True)
    return Result(name, unmoved, moved)


MOVED = (RECORD, 0.5)
SAME, OTHER, STAYED = (
    (run([1, 2, 3]), run([1, 2, 3], MOVED)),
    (run([1, 2, 3]), run([1, 2, 4], MOVED)),
    (run([1, 2, 3]), run([1, 2, 3])),
)


@pytest.mark.parametrize(
    ("name", "pairs", "flaws"),
    [
        ("batch invariant", [SAME, SAME], []),
        ("batch invariant", [SAME, OTHER], ["batch invariant: 1 moved streams differ"]),
        ("batch invariant", [SAME, STAYED], ["batch invariant: 1 streams were not moved"]),
        ("as served", [SAME, OTHER], []),
        ("as served", [STAYED, STAYED], ["as served: 2 streams were not moved"]),
    ],
)
def test_what_must_not_be(name, pairs, flaws):
    assert result(name, *pairs).flaws == flaws


def test_a_row():
    slow = (run([5, 6], step=0.02), run([5, 6], (RECORD | {"downtime_ms": 20.0}, 1.5)))
    row = result("as served", SAME, slow, STAYED).row()
    assert row == "| as served | 2/3 | 2 | 3 | 2.00 | 16.0 | 19.9 | 20.0 |"
    assert row.count("|") == HEADING.splitlines()[0].count("|")


def test_a_row_of_nothing_moved():
    assert (
        result("as served", STAYED).row() == "| as served | 0/1 | 0 | 0 | 0.00 | 0.0 | 0.0 | 20.0 |"
    )


def test_too_few_gpus_are_told_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check.torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--tensor-parallel-size", "2"])
    assert gpu_check.main() == 2
    assert capsys.readouterr().err == "needs 4 GPUs on this machine, 3 are there\n"


def test_one_replica_needs_two_gpus_as_well(monkeypatch):
    monkeypatch.setattr(gpu_check.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--replicas", "1"])
    assert gpu_check.main() == 2


def test_the_fleet_accepts_the_overrides(monkeypatch):
    monkeypatch.setattr(resources, "cpu_build", lambda: False)
    args = overrides(Namespace(model="org/llama", tensor_parallel_size=2, replicas=3))
    loaded = load(args)
    assert (loaded.migration.backend, loaded.migration.enabled) == ("nccl", False)
    assert resources.ranks(loaded.model) == 2


def test_requests_are_greedy_and_seeded_in_turn_and_always_the_same():
    todo = requests(4)
    assert todo == requests(4)
    assert [request.body()["temperature"] for request in todo] == [0, 1.0, 0, 1.0]
    assert len({request.body()["seed"] for request in todo}) == 4


@pytest.mark.parametrize(
    ("line", "tokens"),
    [
        (b'data: {"choices": [{"token_ids": [4, 5]}]}\n', [4, 5]),
        (b'data: {"choices": [{"text": "a", "token_ids": null}]}\n', []),
        (b'data: {"choices": [], "usage": {}}\n', []),
        (b"data: [DONE]\n", []),
        (b"\n", []),
    ],
)
def test_tokens_of_a_line(line, tokens):
    assert tokens_of(line) == tokens


def test_an_error_in_a_stream():
    line = b"data: " + json.dumps({"error": {"message": "engine died"}}).encode()
    with pytest.raises(ServerFailed, match="engine died"):
        tokens_of(line)
