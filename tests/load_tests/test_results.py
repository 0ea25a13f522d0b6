"""What is kept of a run: vLLM's keys, ours, fragmentation, the timeline."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

from load_tests.outcome import Sample
from load_tests.results import POINTS, fragmentation, load_all, save, to_json
from load_tests.results import load as load_result
from tests.load_tests.runs import a_run, load, move, request

STATISTICS = ("mean", "median", "std", "p50", "p95", "p99")


def of(*served, **more):
    return to_json(a_run(served, **more))


def test_throughput_and_latencies():
    result = of(request("a", 0.1, 0.2, 0.4), request("b", 1.3, 1.4, arrival=1.0), duration=2.0)
    assert result["request_throughput"] == pytest.approx(1.0)
    assert result["total_input_tokens"] == 20
    assert result["output_throughput"] == pytest.approx(2.5)
    assert result["total_token_throughput"] == pytest.approx(12.5)
    assert result["mean_ttft_ms"] == pytest.approx(200)
    assert result["std_ttft_ms"] == pytest.approx(100)
    assert result["p99_ttft_ms"] == pytest.approx(298)  # of 100 and 300
    assert result["p50_tpot_ms"] == result["median_tpot_ms"] == pytest.approx(125)
    assert result["mean_itl_ms"] == pytest.approx(400 / 3)
    assert result["mean_e2el_ms"] == pytest.approx(400)


def test_a_request_of_one_token_has_no_time_for_each_output_token():
    result = of(request("a", 0.5), request("b", 0.1, 0.3))
    assert result["mean_tpot_ms"] == pytest.approx(200)
    assert result["mean_ttft_ms"] == pytest.approx(300)


@pytest.mark.parametrize("failed", [request("a", 5.0, 9.0, error="HTTP 500"), request("a")])
def test_failed_requests_are_counted_and_left_out(failed):
    result = of(failed, request("b", 0.1, 0.2))
    assert (result["num_prompts"], result["completed"], result["failed"]) == (2, 1, 1)
    assert result["mean_e2el_ms"] == pytest.approx(200)
    assert result["total_output_tokens"] == 2
    assert result["output_lens"] == [0, 2]
    assert result["ttfts"] == [0.0, 0.1]
    assert result["errors"] == [failed.error, ""]


def test_nothing_at_all():
    result = of()
    assert result["completed"] == result["p99_ttft_ms"] == result["fragmentation"] == 0


def vllm_keys():
    """Those that its benchmark's source spells out, as `{"key": ...}` or `result["key"] = ...`."""
    folder = Path(find_spec("vllm").origin).parent  # importing it takes seconds
    tree = ast.parse((folder / "benchmarks/serve.py").read_text())
    written = {
        target.slice.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant)
    }
    dicts = (node for node in ast.walk(tree) if isinstance(node, ast.Dict))
    return written | {k.value for node in dicts for k in node.keys if isinstance(k, ast.Constant)}


def test_vllms_keys_are_spelt_as_vllm_does():
    keys = list(of(request("a", 0.1, 0.2)))
    latencies = {f"{s}_{name}_ms" for s in STATISTICS for name in ("ttft", "tpot", "itl", "e2el")}
    theirs = set(keys[: keys.index("scenario")])
    assert latencies <= theirs
    assert theirs - latencies <= vllm_keys()
    assert {"max_concurrency", "request_rate", "start_times", "input_lens"} <= theirs


def test_waiting_and_preemptions():
    result = of(
        request("a", 0.1, queue_s=0.05),
        request("b", 0.1, queue_s=0.15, preemptions=2, preempted_s=3.0),
        request("c", 0.1, preemptions=1, preempted_s=1.0),
        request("d", 0.1),
        request("e", error="gone", preemptions=1, preempted_s=99.0),
    )
    assert result["mean_queue_ms"] == pytest.approx(50)
    assert (result["preemptions"], result["preempted_requests"]) == (4, 3)
    assert result["mean_preemption_loss_ms"] == pytest.approx(1000)  # of all that completed
    assert result["mean_preempted_loss_ms"] == pytest.approx(2000)


def test_moves():
    attempts = [
        move(downtime_ms=10.0),
        move(2.0004, "y", "x", reason="drain", downtime_ms=30.0),
        move(outcome="refused", downtime_ms=0.0),
        move(outcome="aborted", reason="drain", downtime_ms=500.0),
    ]
    served = [request("a", 0.1, moves=2, preempted_after_move=1), request("b", 0.1)]
    result = of(*served, moves=attempts)
    assert result["migrations"] == {
        "completed": 2,
        "refused": 1,
        "aborted": 1,
        "by_reason": {
            "balance": {"completed": 1, "refused": 1},
            "drain": {"completed": 1, "aborted": 1},
        },
    }
    assert result["moves"] == [[1.0, "x", "y", "a", 7], [2.0, "y", "x", "a", 7]]
    assert (result["moved_requests"], result["preempted_after_move"]) == (1, 1)
    assert result["mean_migration_downtime_ms"] == pytest.approx(20)


def test_classes_are_told_apart_where_there_are_several():
    urgent = request("a", 0.1, 0.2, priority="high")
    result = of(urgent, request("b", 0.3, 0.7), request("c", 0.5, 0.9))
    assert result["priorities"]["high"]["mean_ttft_ms"] == pytest.approx(100)
    assert result["priorities"]["normal"]["mean_ttft_ms"] == pytest.approx(400)
    assert result["priorities"]["normal"]["completed"] == 2
    assert of(urgent)["priorities"] == {}


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        ([], 0.0),
        ([load(used=100), load(used=0)], 0.0),  # nobody waits
        ([load(used=90, demand=10), load(used=0)], 0.0),  # it fits where it is
        ([load(used=90, demand=30), load(used=70)], 0.15),  # 30 of 40 free, of 200
        ([load(used=90, demand=40), load(used=70)], 0.2),  # all that is free
        ([load(used=90, demand=41), load(used=70)], 0.0),  # too much for the whole cluster
        # 25 and 20 fit into 60, 50 as well no more; the smallest come first
        ([load(used=80, demand=50), load(used=80, demand=25), load(used=80)], 25 / 300),
        ([load(used=80, demand=25), load(used=85, demand=20), load(used=80)], 45 / 300),
        # a draining instance neither gives nor waits
        ([load(used=90, demand=30), load(used=0, state="draining")], 0.0),
        ([load(used=90, demand=30, state="draining"), load(used=0)], 0.0),
    ],
)
def test_fragmentation(loads, expected):
    assert fragmentation(loads) == pytest.approx(expected)


def test_mean_fragmentation_is_over_time():
    apart, together = (load(used=90, demand=30), load(used=70)), (load(used=20),)
    samples = [Sample(0.0, together), Sample(1.0, apart), Sample(6.0, together)]
    result = of(samples=samples)
    assert result["fragmentation"] == pytest.approx(0.15 * 5 / 10)
    assert result["timeline"]["fragmentation"] == [0.0, 0.15, 0.0]


def test_timeline_of_instances_that_come_and_go():
    samples = [
        Sample(0.0, (load("x", used=25, running=3),)),
        Sample(1.0, (load("x", used=50, waiting=2), load("y", total=0, state="starting"))),
        Sample(2.0, (load("y", used=100),)),
    ]
    timeline = of(samples=samples)["timeline"]
    assert timeline["seconds"] == [0.0, 1.0, 2.0]
    assert timeline["used"] == {"x": [0.25, 0.5, None], "y": [None, 0.0, 1.0]}
    assert timeline["waiting"]["x"] == [0, 2, None]
    assert timeline["running"]["x"] == [3, 0, None]


def test_instances_are_paid_for_while_they_are_there_whatever_they_do():
    starting, draining = load("y", total=0, state="starting"), load("x", state="draining")
    samples = [
        Sample(0.0, (load("x"),)),
        Sample(4.0, (load("x"), starting)),
        Sample(6.0, (draining, load("y"))),
        Sample(9.0, (load("y"),)),
    ]
    result = of(samples=samples)
    assert result["instance_seconds"] == pytest.approx(4 + 2 * 5 + 1)
    assert result["mean_instances"] == pytest.approx(1.5)


@pytest.mark.parametrize(("samples", "points"), [(POINTS, POINTS), (POINTS + 1, 301), (6000, 600)])
def test_a_long_timeline_is_thinned_out_over_all_of_it(samples, points):
    timeline = of(samples=[Sample(float(n), (load(used=n % 7),)) for n in range(samples)])
    seconds = timeline["timeline"]["seconds"]
    assert len(seconds) == len(timeline["timeline"]["used"]["x"]) == points
    assert seconds[-1] >= samples - samples / points - 1


def test_saved_and_loaded(tmp_path):
    runs = [a_run(rate=rate, facts={"drift": 0.5}) for rate in (10.0, 7.5)]
    saved = [save(run, tmp_path) for run in runs]
    assert saved[1] == load_result(tmp_path / "m-m" / "fleet-llumnix-7.5.json")
    save(a_run(backend="simulator"), tmp_path)
    assert saved[0]["facts"] == {"drift": 0.5}
    cells = load_all(tmp_path / "m-m", "fleet")
    assert list(cells) == [("llumnix", 7.5), ("llumnix", 10.0)]
    assert cells["llumnix", 7.5] == saved[1]
