"""Which promises a run broke, and what is kept of it."""

import json
from dataclasses import replace

import pytest

from load_tests.chaos import report
from load_tests.chaos.outcome import Break, breaks
from load_tests.chaos.scenarios import SCENARIOS
from tests.load_tests.chaos.runs import event, look, outcome, stream, told, usage

RIGHT = stream(1.0, 2.0, 3.0)
WRONG = stream(1.0, 2.0, 3.0, ids=[0, 1, 9], name="wrong")
FAILED = stream(1.0, 2.0, name="failed", error="HTTP 503")


def test_a_run_in_which_all_is_right_keeps_its_promises():
    assert outcome(streams=[RIGHT], looks=[look(0, 2)]).broken() == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"streams": [RIGHT, WRONG]}, "1 streams with wrong tokens"),
        ({"streams": [RIGHT, FAILED]}, "1 streams failed"),
        ({"leaks": ["x still has 3 blocks_used"]}, "x still has 3 blocks_used"),
        ({"looks": [look(0, 3), look(9, 2)]}, "held more requests than there were for 9.0 s"),
        ({"scenario": SCENARIOS["kills-emulated"]}, "only 0 of 27 kills"),
    ],
)
def test_each_broken_promise_is_told(more, said):
    (broken,) = outcome(**more).broken()
    assert said in broken


def test_a_control_must_lose_streams_and_get_none_wrong():
    assert outcome("control", [RIGHT, FAILED]).broken() == []
    assert "no control" in outcome("control", [RIGHT]).broken()[0]
    assert len(outcome("control", [FAILED, WRONG]).broken()) == 1


def test_growth_matters_where_nothing_may_grow():
    samples = [usage(at, rss_mib=1000.0 + 5 * at) for at in range(101)]
    assert outcome("kills-emulated", [RIGHT], usage=samples).broken() == []
    broken = outcome("soak", [RIGHT], usage=samples).broken()
    assert [said.partition(":")[0] for said in broken] == ["LLMReplica", "Scheduler", "Ingress"]


KILL = event(2.0, "ingress", "Ingress")
HIT = stream(1.0, 2.1, name="hit", error="reset")
SPARED = stream(1.0, 2.0, 3.0)
NEXT = stream(2.5, 2.6, 2.7, started=2.2)
REFUSED = stream(started=2.05, name="refused", error="HTTP 500")


def test_the_streams_of_a_killed_ingress_may_break():
    found = outcome("ingress", [HIT, SPARED, REFUSED, NEXT], [KILL])
    assert found.broken() == []
    assert breaks(found) == [Break(2, 1, 1, pytest.approx(0.5))]


def test_no_others_may():
    late = replace(HIT, ended=HIT.ended + 10)
    early = replace(HIT, ended=KILL.at - 0.1)
    for wrongly in (late, early):
        (said,) = outcome("ingress", [HIT, wrongly, SPARED], [KILL]).broken()
        assert "1 streams failed while no ingress was killed" in said
    (said,) = outcome("ingress", [HIT, NEXT], [KILL]).broken()
    assert "all streams broke" in said


@pytest.fixture
def run():
    """A kill in which one stream was recovered, one failed, and one went wrong."""
    paused = stream(1.0, 1.1, 3.1, name="paused")
    known = told("a", "b", recoveries=1, recovered_ms=1500.0, moves=["completed", "refused"])
    return outcome(
        streams=[paused, RIGHT, WRONG, FAILED],
        events=[event(1.2, "kill", "a"), event(2.0, "scheduler", "Scheduler")],
        told={"paused": known, "chaos-0": told("b")},
        looks=[look(0, 2)],
        usage=[usage(at) for at in range(0, 60, 5)],
    )


def test_all_is_written(run, tmp_path):
    shown = report.write(run, tmp_path)
    assert shown in (tmp_path / "kills-emulated.md").read_text()
    assert "<svg" in (tmp_path / "kills-emulated.svg").read_text()
    kept = json.loads((tmp_path / "kills-emulated.json").read_text())
    assert (kept["streams"], kept["failed"], kept["wrong"]) == (4, 1, 1)
    assert (kept["instances killed"], kept["others killed"], kept["recoveries"]) == (1, 1, 1)
    assert kept["failures"] == ["2.0 s, failed: HTTP 503"]
    assert kept["events"][0]["at"] == pytest.approx(1.2)
    assert kept["pauses"][0]["kind"] == "kill"
    assert kept["longest pause of the others, s"] == pytest.approx(1.0)


def test_the_tables_say_what_happened(run):
    shown = report.to_markdown(run)
    assert "Broken: 1 streams with wrong tokens; 1 streams failed." in shown
    assert "Faults: 1 x kill, 1 x scheduler. Moves: 1 x completed, 1 x refused." in shown
    assert "| kill | 1 | 2.00 | 2.00 | 0.500 | 0.500 |" in shown
    assert "| LLMReplica | rss_mib | 100 | 100 |" in shown


def test_a_run_in_which_nothing_happened_is_written_too(tmp_path):
    assert "All promises kept." in report.write(outcome(streams=[RIGHT]), tmp_path)


def test_what_killing_the_scheduler_costs_is_told_beside_the_undisturbed_streams():
    shown = report.to_markdown(outcome("scheduler", [stream(2.0, 3.0, 4.0)], calm=[RIGHT]))
    assert "| undisturbed | 1 | 1,000 | 1,000 |" in shown
    assert "| with faults | 1 | 2,000 | 2,000 |" in shown
