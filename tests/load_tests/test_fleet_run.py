"""From what clients saw and the admin API told to what came of a run, the same as a simulated one.

What the admin API tells is made by the ingress' own code, and has been JSON.
"""

import json

import msgspec
import pytest

from app.admin import load_to_json
from app.entry import Entry
from app.stalls import Stalls
from load_tests.client import Record
from load_tests.fleet_run import _loads, _moves, _refusals, _served
from load_tests.traces.trace import TraceRequest
from migration.snapshot import MigrationRecord, Submission
from tests.load_tests.runs import load

START, START_UNIX = 1000.0, 1.7e9
REQUEST = TraceRequest(2.0, 10, 3, "high")


def move(outcome="completed", at=START_UNIX + 5):
    numbers = {"stages": 2, "blocks": 7, "bytes": 4096, "downtime_ms": 21.5}
    return MigrationRecord("engine-1", "x", "y", "balance", outcome, **numbers, at=at)


def told(*moves, **stalls):
    """Of a request, by GET /fleet/requests."""
    entry = Entry(Submission("engine-1", "mine", b"", 10, "high", "tcp://here"))
    entry.migrations += moves
    entry.stalls = Stalls(**stalls)
    return json.loads(json.dumps(entry.to_json()))


def record(*arrivals, error=""):
    return Record(START + 2.5, [START + at for at in arrivals], error=error)


def served(record, known=None):
    return _served("mine", REQUEST, record, START, {} if known is None else known)


def test_times_are_those_since_the_start_of_the_run():
    one = served(record(3.0, 3.5, 4.0))
    assert (one.arrival, list(one.tokens)) == (2.5, [3.0, 3.5, 4.0])


def test_a_request_is_as_the_trace_has_it():
    one = served(record(3.0, 3.5, 4.0))
    assert (one.request_id, one.input_tokens, one.output_tokens) == ("mine", 10, 3)
    assert (one.priority, one.error) == ("high", "")


def test_a_missing_token_is_an_error():
    assert served(record(3.0, 3.5)).error == "2 of 3 tokens"


def test_the_client_s_error_says_more_than_a_missing_token():
    assert served(record(3.0, error="HTTP 500: engine died")).error == "HTTP 500: engine died"


def test_how_long_it_stood_still_is_told_by_the_fleet():
    stalls = {"queue_s": 1.5, "preemptions": 2, "preempted_s": 0.25, "preempted_after_move": 1}
    one = served(record(3.0, 3.5, 4.0), told(**stalls))
    assert {key: getattr(one, key) for key in stalls} == stalls


def test_how_quickly_requests_were_refused_is_a_fact():
    refused = Record(START, ended=START + 0.02, error="HTTP 429: full")
    failed = Record(START, ended=START + 9, error="HTTP 503: no instance takes the request")
    assert _refusals([refused, failed]) == {"refusal_p99_ms": pytest.approx(20)}
    assert _refusals([failed]) == {}


def test_only_completed_moves_are_a_request_s():
    known = told(move(), move("refused"), move("aborted"), move())
    assert served(record(3.0, 3.5, 4.0), known).moves == 2


def test_a_request_that_the_fleet_never_saw_stood_still_nowhere():
    one = served(record(error="HTTP 503: no replica"))
    assert (one.queue_s, one.preemptions, one.preempted_s, one.moves) == (0, 0, 0, 0)
    assert list(_moves("mine", {}, START_UNIX)) == []


def test_every_attempt_to_move_it_is_kept_with_its_time_in_the_run():
    first, second = _moves("mine", told(move("refused"), move(at=START_UNIX + 6)), START_UNIX)
    assert second == msgspec.structs.replace(move(), request_id="mine", at=pytest.approx(6))
    assert (first.outcome, first.at) == ("refused", pytest.approx(5))


@pytest.mark.parametrize(
    "one",
    [
        load("x", used=50, demand=5, running=3, waiting=1, freeness=11.25, emulation_drift=0.01),
        load("y", state="draining", migrating_in=1, migrating_out=2),
    ],
)
def test_loads_are_as_the_instances_reported_them(one):
    fleet = {"replicas": [load_to_json(one)]}
    assert _loads(json.loads(json.dumps(fleet))) == (one,)


def test_a_draining_instance_has_no_freeness_to_speak_of():
    fleet = {"replicas": [load_to_json(load("x", state="draining", freeness=float("-inf")))]}
    (one,) = _loads(json.loads(json.dumps(fleet)))
    assert one.freeness < -1e6
