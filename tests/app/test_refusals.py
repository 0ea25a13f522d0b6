"""A refusal takes the place of an answer that has not begun; all else passes as it comes."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from app.refusals import Answer, Refusal, RefusalMiddleware, current

FULL = Refusal(429, "the queue is full", retry_after_s=7)
NOBODY = Refusal(503, "nobody takes it")


def serving(answer: Callable[[Request], Any]) -> RefusalMiddleware:
    return RefusalMiddleware(Starlette(routes=[Route("/", answer, methods=["POST"])]))


def post(answer: Callable[[Request], Any]) -> Any:
    return TestClient(serving(answer)).post("/")


def whole(refusal: Refusal | None) -> Callable[[Request], Response]:
    """Answers at once."""

    def answer(request: Request) -> Response:
        if refusal:
            assert current.get().refuse(refusal)
        return JSONResponse({"text": "ab"}, headers={"x-of": "vllm"})

    return answer


def streamed(
    refusal: Refusal | None = None, after: int = 0, admitted: int = 0
) -> Callable[[Request], Response]:
    """Streams `a` and `b`, the start first, as vLLM does; is admitted or refused before a chunk."""

    async def chunks() -> AsyncIterator[str]:
        for index, chunk in enumerate("ab"):
            await asyncio.sleep(0)
            if index == admitted:
                current.get().admitted = True
            if refusal and index == after:
                current.get().refuse(refusal)
            yield chunk

    return lambda _: StreamingResponse(chunks(), headers={"x-of": "vllm"})


@pytest.mark.parametrize("answer", [whole(None), streamed()])
def test_what_is_not_refused_passes(answer):
    response = post(answer)
    assert response.status_code == 200
    assert response.headers["x-of"] == "vllm"
    assert response.text in ("ab", '{"text":"ab"}')


@pytest.mark.parametrize("answer", [whole(FULL), streamed(FULL)])
def test_a_refusal_replaces_all_of_the_answer(answer):
    response = post(answer)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "7"
    assert "x-of" not in response.headers
    assert response.json() == {
        "error": {
            "message": "the queue is full",
            "type": "RateLimitError",
            "param": None,
            "code": 429,
        }
    }


def test_a_refusal_without_a_time_has_no_retry_after():
    response = post(streamed(NOBODY))
    assert response.status_code == 503
    assert "retry-after" not in response.headers
    assert response.json()["error"]["type"] == "ServiceUnavailableError"


def test_what_the_client_has_a_part_of_ends_with_the_refusal():
    response = post(streamed(NOBODY, after=1))
    assert response.status_code == 200
    text, _, rest = response.text.partition("data: ")
    error, _, last = rest.partition("\n\n")
    assert (text, last) == ("a", "data: [DONE]\n\n")
    assert json.loads(error)["error"]["code"] == 503


def test_what_a_stream_says_before_its_request_is_admitted_can_be_taken_back():
    assert post(streamed(FULL, after=1, admitted=1)).status_code == 429
    assert post(streamed(admitted=1)).text == "ab"


def test_a_stream_that_never_asks_the_engines_comes_whole():
    assert post(streamed(admitted=99)).text == "ab"


def test_what_is_no_http_answer_cannot_be_refused():
    answer = Answer(http=False)
    assert (answer.refuse(FULL), answer.refusal) == (False, None)


def test_the_first_refusal_counts():
    def answer(request: Request) -> Response:
        current.get().refuse(FULL)
        current.get().refuse(NOBODY)
        return Response()

    assert post(answer).status_code == 429


def test_one_request_s_refusal_is_not_the_next_one_s():
    refusals = iter([FULL, None])
    client = TestClient(serving(lambda request: whole(next(refusals))(request)))
    assert [client.post("/").status_code for _ in range(2)] == [429, 200]


async def sent_by(method: str, steps: list[Any]) -> list[list[str]]:
    """What has gone out after each message of an app; a callable is run instead."""
    out: list[str] = []
    seen: list[list[str]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for step in steps:
            if callable(step):
                step()
            else:
                await send(step)
            seen.append(list(out))

    async def send(message: Any) -> None:
        out.append(message.get("body", b"start").decode())

    await RefusalMiddleware(app)({"type": "http", "method": method}, None, send)  # type: ignore
    return seen


def chunk(body: str, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body.encode(), "more_body": more}


START = {"type": "http.response.start", "status": 200, "headers": []}


def admit() -> None:
    current.get().admitted = True


async def test_each_chunk_goes_out_as_it_comes_and_the_first_one_with_the_start():
    seen = await sent_by("POST", [START, admit, chunk("a"), chunk("b"), chunk("", more=False)])
    assert seen == [
        [],
        [],
        ["start", "a"],
        ["start", "a", "b"],
        ["start", "a", "b", ""],
    ]


async def test_streams_that_ask_for_nothing_are_not_kept_back():
    assert (await sent_by("GET", [START, chunk("a")]))[-1] == ["start", "a"]


async def test_what_is_not_http_passes_untouched():
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope["type"], current.get(None)))

    await RefusalMiddleware(app)({"type": "websocket"}, None, None)  # type: ignore[arg-type]
    assert seen == [("websocket", None)]


async def send(begun: bool, path: str) -> tuple[int | None, bytes]:
    """Status and body of the refusal `NOBODY`."""
    sent: list[dict[str, Any]] = []

    async def keep(message: Any) -> None:
        sent.append(message)

    await NOBODY.send(begun, {"type": "http", "path": path}, None, keep)  # type: ignore[arg-type]
    return sent[0].get("status"), sent[-1]["body"]


async def test_anthropics_clients_are_refused_in_their_form():
    status, body = await send(False, "/prefix/v1/messages")
    error = {"type": "ServiceUnavailableError", "message": "nobody takes it"}
    assert (status, json.loads(body)) == (503, {"type": "error", "error": error})
    _, body = await send(True, "/v1/messages")
    event, data, *end = body.decode().split("\n")
    assert (event, end) == ("event: error", ["", ""])
    assert json.loads(data.removeprefix("data: ")) == {"type": "error", "error": error}


def test_what_goes_on_after_its_answer_is_not_refused():
    """A background response: its HTTP request was answered long ago."""
    answers = []

    async def answer(request: Request) -> JSONResponse:
        answers.append(current.get())
        return JSONResponse({})

    assert post(answer).status_code == 200
    assert not answers[0].refuse(NOBODY)
