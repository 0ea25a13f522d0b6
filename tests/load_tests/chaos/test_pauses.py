"""How long recovered streams stood still, and because of what."""

import pytest

from load_tests.chaos.pauses import of_stream
from tests.load_tests.chaos.runs import PREFILLS, event, stream, told

PAUSED = stream(1.0, 1.1, 3.1, 3.2)
ONCE = {"recoveries": 1, "recovered_ms": 1500.0}


def pause(*events, of=PAUSED, **more):
    return of_stream(of, told("a", "b", **{**ONCE, **more}), events, PREFILLS)


def test_a_pause_is_that_of_the_fault_that_hit_an_instance_of_the_stream():
    found = pause(event(0.5, "kill", "z"), event(1.2, "source", "a"), event(2.0, "burst"))
    assert found.kind == "source"
    assert found.seconds == pytest.approx(2.0)


def test_what_the_ingress_did_not_know_of_is_the_rest_of_the_pause():
    assert pause(event(1.2, "kill", "a")).noticed_s == pytest.approx(0.5)
    assert pause(event(1.2, "kill", "a"), recoveries=2).noticed_s is None
    assert pause(event(1.2, "kill", "a"), recovered_ms=2500.0).noticed_s == 0.0


def test_a_pause_is_compared_with_the_prefill_of_all_tokens_so_far():
    found = pause(event(1.2, "kill", "a"))
    assert found.tokens == 102
    assert found.prefill_s == pytest.approx(0.104)


def test_a_token_on_its_way_may_arrive_after_the_fault():
    assert pause(event(1.05, "kill", "a")).seconds == pytest.approx(2.0)


def test_a_fault_after_the_request_had_left_for_good_takes_nothing_from_another_one():
    found = pause(event(1.2, "kill", "a"), event(3.15, "long hang", "b", hang_s=9.0))
    assert found.kind == "kill"


def test_a_recovery_without_a_fault_of_ours_is_told_as_such():
    found = pause(event(1.2, "kill", "z"))
    assert (found.kind, found.seconds) == (None, pytest.approx(2.0))


def test_a_stream_that_was_not_recovered_has_no_pause():
    assert pause(event(1.2, "kill", "a"), recoveries=0) is None
    assert of_stream(PAUSED, {}, [event(1.2, "kill", "a")], PREFILLS) is None
    assert pause(event(1.2, "kill", "a"), of=stream()) is None


@pytest.mark.parametrize(("tokens", "seconds"), [(50, 0.1), (100, 0.1), (150, 0.2), (900, 0.3)])
def test_a_prefill_lies_between_those_that_were_measured(tokens, seconds):
    assert PREFILLS.at(tokens) == pytest.approx(seconds)
