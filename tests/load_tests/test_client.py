"""The client against a small SSE server."""

import asyncio
import json
import time

import pytest
from aiohttp import web

from load_tests.client import Completion, Events, closed_loop, connect, open_loop

REQUEST = Completion("m", "hello", 3)


def event(**content):
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


TOKEN = event(id="x", choices=[{"text": "a\n"}])
USAGE = event(id="x", choices=[], usage={"prompt_tokens": 5, "completion_tokens": 3})
DONE = b"data: [DONE]\n\n"


def named(*token_ids, **more):
    """As vLLM sends it where `return_token_ids` was asked for."""
    return event(id="x", choices=[{"text": "a]", **more, "token_ids": list(token_ids)}])


class SlowServer:
    """Sends `pieces` with `delay` before each; remembers bodies, and how many came at once."""

    def __init__(self, *pieces, delay=0.0, status=200):
        self.pieces, self.delay, self.status = pieces, delay, status
        self.bodies, self.open, self.most = [], 0, 0

    async def __aenter__(self):
        app = web.Application()
        app.router.add_post("/v1/completions", self.handle)
        self.runner = web.AppRunner(app)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_):
        await self.runner.cleanup()

    async def handle(self, request):
        self.bodies.append(await request.json())
        self.open += 1
        self.most = max(self.most, self.open)
        response = web.StreamResponse(status=self.status)
        await response.prepare(request)
        for piece in self.pieces:
            await asyncio.sleep(self.delay)
            await response.write(piece)
        self.open -= 1
        return response


async def test_times_each_token():
    async with SlowServer(TOKEN, TOKEN, TOKEN, USAGE + DONE, delay=0.03) as server:
        (record,) = await closed_loop(server.url, [REQUEST], 1)
    assert not record.error
    assert (record.prompt_tokens, record.output_tokens) == (5, 3)
    assert len(record.arrivals) == 3
    assert record.ttft >= 0.03
    assert all(gap >= 0.02 for gap in record.itl)
    assert server.bodies[0]["ignore_eos"] is True
    assert server.bodies[0]["max_tokens"] == 3


async def test_closed_loop_keeps_its_concurrency_and_sends_all():
    async with SlowServer(TOKEN, USAGE, DONE, delay=0.005) as server:
        seen = []
        records = await closed_loop(server.url, [REQUEST] * 10, 3, seen.append)
    assert len(records) == len(seen) == len(server.bodies) == 10
    assert server.most == 3


async def test_open_loop_does_not_wait_for_answers():
    async with SlowServer(TOKEN, USAGE, DONE, delay=0.1) as server:
        began = time.perf_counter()
        async with connect() as session:
            arrivals = [(0.02 * i, REQUEST) for i in range(5)]
            records = await open_loop(session, server.url, arrivals)
    assert server.most == 5
    assert sorted(r.started - began for r in records)[-1] >= 0.08


async def test_http_errors_are_records():
    async with SlowServer(b"no such model", status=404) as server:
        (record,) = await closed_loop(server.url, [REQUEST], 1)
    assert record.error == "HTTP 404: no such model"


@pytest.mark.parametrize("pieces", [(TOKEN,), (TOKEN, USAGE), (TOKEN, DONE), ()])
async def test_a_stream_that_ends_early_is_an_error(pieces):
    async with SlowServer(*pieces) as server:
        (record,) = await closed_loop(server.url, [REQUEST], 1)
    assert "ended early" in record.error


async def test_a_server_that_is_not_there_is_an_error():
    (record,) = await closed_loop("http://127.0.0.1:9", [REQUEST], 1)
    assert "Connector" in record.error


def test_events_may_be_cut_anywhere():
    whole = TOKEN + TOKEN + USAGE + DONE
    for cut in range(len(whole)):
        events = Events()
        assert events.feed(whole[:cut]) + events.feed(whole[cut:]) == 2
        assert events.usage() == {"prompt_tokens": 5, "completion_tokens": 3}


def test_named_tokens_are_counted_one_by_one():
    events = Events()
    assert events.feed(named(7)) == 1
    assert events.feed(named(7, 8, 9) + named(10, 11)) == 5


def test_named_tokens_may_be_cut_anywhere():
    whole = named(7, 8, prompt_token_ids=[1, 2, 3]) + named(9) + named() + USAGE + DONE
    for cut in range(len(whole)):
        events = Events()
        assert events.feed(whole[:cut]) + events.feed(whole[cut:]) == 3
        assert events.usage()["completion_tokens"] == 3


async def test_named_tokens_are_kept_however_they_come():
    async with SlowServer(named(7), named(8, 9), named(), USAGE + DONE) as server:
        (record,) = await closed_loop(server.url, [REQUEST], 1)
    assert record.token_ids == b"7,8,9,"


def test_the_prompt_s_tokens_are_not_the_stream_s():
    assert Events().feed(named(7, prompt_token_ids=[1, 2, 3])) == 1


def test_a_last_event_may_name_no_token():
    assert Events().feed(named(finish_reason="length")) == 0


def test_a_text_that_looks_like_named_tokens_is_none():
    assert Events().feed(event(choices=[{"text": '"token_ids":[1,2,3]'}])) == 1


async def test_tokens_that_come_in_one_event_have_one_time():
    async with SlowServer(named(7), named(8, 9), USAGE + DONE) as server:
        (record,) = await closed_loop(server.url, [REQUEST], 1)
    first, second, third = record.arrivals
    assert first <= second == third


def test_an_error_in_the_stream_is_told():
    events = Events()
    assert events.feed(TOKEN + event(error={"message": "engine died"}) + DONE) == 1
    with pytest.raises(ValueError, match="engine died"):
        events.usage()
