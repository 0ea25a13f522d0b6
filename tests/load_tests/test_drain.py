"""What load_tests.drain sends, waits for and makes of a fleet's log; no server."""

import json

import pytest

from app.config import load
from deployments.emulated.profile import load_profile
from load_tests import drain
from load_tests import drain_report as report
from load_tests.baselines import merge
from load_tests.client import Record
from load_tests.drain_report import Drain, Phase
from load_tests.servers import ServerFailed

PROFILE = load_profile(drain.PROFILE)
START = (
    "2026-11-21 13:39:48,622\tINFO worker.py:2029 -- Started a local Ray instance."
    " View the dashboard at \x1b[1m\x1b[32mhttp://127.0.0.1:8266 \x1b[39m\x1b[22m\n"
)


def line(text):
    """As a replica's log reaches that of `serve run`."""
    return (
        "\x1b[36m(ServeReplica:llama:LLMReplica pid=22753)\x1b[0m INFO 2026-11-21 13:36:09,915"
        f" llama_LLMReplica u8pfvxmb 02dd2020-8156-49b0-94e0-1f5c4164306d -- {text}\n"
    )


LOG = (
    line("b: Serve stops it, 5 requests to hand over")
    + line("a: Serve stops it, 2 requests to hand over")
    + line("migration of r1 from b to c (drain): completed  stages=2 blocks=40 downtime_ms=20.1")
    + line("b: drained in 1.25 s, 4 requests moved with 160 KV blocks")
)
DRAINS = [Drain("b", 5, 1.25, 4, 160), Drain("a", 2, None)]


def record(tokens=b"1,2,", error="", arrivals=(1.0, 1.1, 1.4)):
    return Record(0.5, list(arrivals), token_ids=tokens, error=error)


def test_a_log_tells_of_each_instance_that_was_stopped_whether_it_was_ever_empty():
    assert report.drains(START + LOG) == DRAINS
    assert report.drains(START) == []


def test_a_log_tells_where_the_dashboard_is():
    assert report.dashboard(START) == "http://127.0.0.1:8266"
    with pytest.raises(ServerFailed, match="dashboard"):
        report.dashboard(LOG)


def test_a_transfer_takes_what_the_profile_says():
    setup, tokens = PROFILE.copy_s, 160 * PROFILE.block_size
    assert DRAINS[0].transfer_s(PROFILE) == pytest.approx(setup + tokens * PROFILE.copy_token_s)
    assert DRAINS[1].transfer_s(PROFILE) == 0.0


def test_a_phase_compares_with_the_same_requests_undisturbed():
    records = [record(), record(b"1,3,"), record(b"1,", "HTTP 503"), record(arrivals=(1.0, 3.0))]
    undisturbed = [record(), record(), record(), record(), record(arrivals=(1.0, 99.0))]
    phase = Phase.of("scale-in", 2.0, DRAINS, records, undisturbed)
    assert (phase.requests, phase.errors, phase.wrong) == (4, ["HTTP 503"], 1)
    assert phase.gap_ms == pytest.approx(2000)
    assert phase.undisturbed_gap_ms == pytest.approx(300)
    assert phase.ttft_p99_ms == phase.undisturbed_ttft_p99_ms == pytest.approx(500)


def test_all_is_written(tmp_path):
    phase = Phase.of("scale-in", 2.0, DRAINS, [record()], [record()])
    shown = report.write({"migration": [phase], "control": []}, [record()], PROFILE, tmp_path)
    assert "| scale-in | migration | b | 5 | 4 | 160 | 0.56 | 1.25 |" in shown
    assert "| scale-in | migration | a | 2 | 0 | 0 | 0.00 | never |" in shown
    assert "| scale-in | migration | 1 | 0 | 0 | 300 (300) | 500 (500) | 2 s |" in shown
    assert (tmp_path / "drain.md").read_text() == shown + "\n"
    kept = json.loads((tmp_path / "drain.json").read_text())
    assert kept["migration"][0]["drains"][0]["blocks"] == 160


@pytest.mark.parametrize("event", drain.EVENTS, ids=lambda event: event.name)
def test_an_event_is_a_configuration_that_the_fleet_takes(event):
    (application,) = drain.config(merge(drain.ARGS, event.args), event.instances)["applications"]
    assert load(application["args"]).replicas == drain.INSTANCES
    assert application["deployments"] == [{"name": "LLMReplica", "num_replicas": event.instances}]
    replaces = application["args"] != drain.ARGS
    assert replaces == (event.name == "rolling update")


def test_a_shorter_load_is_the_beginning_of_a_longer_one():
    short, long = drain.requests(2.0, 5.0), drain.requests(2.0, 20.0)
    assert short == long[: len(short)]
    assert [at for at, _ in short[:3]] == [0.0, 0.5, 1.0]
    assert all(len(one.extra["prompt"]) >= drain.INPUT_TOKENS[0] for _, one in long)
