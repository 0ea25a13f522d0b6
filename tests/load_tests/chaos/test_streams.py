"""What a stream came to, and where it stood still; against a small server."""

import pytest

from load_tests.chaos.crowd import Crowd
from load_tests.chaos.run import connect
from load_tests.chaos.workload import pool
from tests.load_tests.chaos.runs import BEGAN, stream
from tests.load_tests.test_client import DONE, USAGE, SlowServer, event

EXPECTED = stream(1.0, 2.0, 3.0)
REQUESTS = pool("emulated", 0, count=3)


def tokens(*token_ids, end=None):
    choice = {"text": "x" * len(token_ids), "token_ids": list(token_ids), "finish_reason": end}
    return event(choices=[choice])


async def run(*pieces, **server):
    async with SlowServer(*pieces, **server) as running, connect() as session:
        (found,) = await Crowd(session, running.url, REQUESTS[:1], "s", 0).each_once(1)
    return found


async def test_tokens_have_their_times_and_their_ids():
    found = await run(tokens(5, 6), tokens(7), tokens(8, end="length"), USAGE, DONE, delay=0.01)
    assert found.token_ids.tolist() == [5, 6, 7, 8]
    assert found.text == "xxxx"
    assert list(found.arrivals) == sorted(found.arrivals)
    assert found.arrivals[0] == pytest.approx(found.arrivals[1], abs=0.005)
    assert found.started < found.arrivals[0] < found.ended
    assert found.verdict(found) == "right"


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ([tokens(5), event(error={"message": "lost"}), DONE], "lost"),
        ([tokens(5)], "ended early"),
        ([tokens(5, end="abort"), DONE], "ended by abort"),
        ([tokens(5), DONE], "ended by None"),
        ([b"data: {\n\n"], "JSON"),
    ],
)
async def test_a_stream_that_does_not_come_to_its_end_has_failed(pieces, said):
    found = await run(*pieces)
    assert said in found.error
    assert found.ended
    assert found.verdict(EXPECTED) == "failed"


async def test_a_refusal_is_a_failure():
    assert "HTTP 503" in (await run(status=503)).error


async def test_a_server_that_is_not_there_is_a_failure():
    async with connect() as session:
        (found,) = await Crowd(session, "http://127.0.0.1:9", REQUESTS[:1], "s", 0).each_once(1)
    assert "Cannot connect" in found.error


async def test_a_crowd_asks_until_it_need_not_go_on():
    async with SlowServer(tokens(1, end="stop"), DONE) as server, connect() as session:
        crowd = Crowd(session, server.url, REQUESTS, "crowd", 0)
        await crowd.keep_asking(3, lambda: len(crowd.streams) < 10)
        crowd.burst(5)
        await crowd.rest()
    assert crowd.ended == len(crowd.streams) == len(server.bodies) == 15
    assert not crowd.open
    assert len({one.name for one in crowd.streams}) == 15


@pytest.mark.parametrize(
    "other",
    [
        stream(1.0, 2.0, 3.0, ids=[0, 9, 2]),
        stream(1.0, 2.0),
        stream(1.0, 2.0, 3.0, 4.0),
        stream(1.0, 2.0, 3.0, end="stop"),
    ],
)
def test_other_tokens_or_another_end_are_wrong(other):
    assert other.verdict(EXPECTED) == "wrong"


def test_other_times_are_right_and_what_runs_is_open():
    assert stream(5.0, 6.0, 9.0).verdict(EXPECTED) == "right"
    assert stream(1.0, open_=True).verdict(EXPECTED) == "open"


def test_a_difference_is_told_by_its_first_token():
    said = stream(1.0, 2.0, 3.0, ids=[0, 9, 2]).difference(EXPECTED)
    assert "from token 1 of 3 on" in said
    assert "from token 2 of 3 on" in stream(1.0, 2.0).difference(EXPECTED)


def test_the_longest_gap_of_all_or_around_a_time():
    one = stream(1.0, 1.1, 4.1, 4.2, 6.2)
    gap = one.longest_gap()
    assert (gap.tokens, gap.since, gap.until) == (2, BEGAN + 1.1, BEGAN + 4.1)
    assert one.longest_gap(BEGAN + 5, BEGAN + 5.5).tokens == 4
    assert one.longest_gap(BEGAN + 7, BEGAN + 8) is None


def test_waiting_for_the_first_token_is_a_gap_too():
    assert stream(3.0, 3.1).longest_gap().tokens == 0
    assert stream().longest_gap() is None
