"""What our headers say, as seen by what runs inside the request."""

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from app.config import PriorityClass
from app.priorities import Priorities
from app.request_context import RequestContext, RequestContextMiddleware, current

PRIORITIES = Priorities(
    {"high": PriorityClass(priority=-10, api_keys=["sk-high"]), "normal": PriorityClass()}
)
MADE_BY_SERVE = "0f8fad5b-d9cb-469f-a165-70867728950e"


def answer(request: Request) -> JSONResponse:
    context = current.get()
    default = context.caller and context.caller.default
    return JSONResponse([context.request_id, context.priority_class, context.chosen_id, default])


@pytest.fixture
def client() -> TestClient:
    return TestClient(RequestContextMiddleware(Starlette(routes=[Route("/", answer)]), PRIORITIES))


def said(client: TestClient, **headers: str) -> list[str | None]:
    """Its id, its class, its id if the client chose it; and the class that its key gives."""
    return client.get("/", headers=headers).json()


def test_without_headers_nothing_is_known(client):
    assert said(client) == [None, None, None, None]


def test_the_client_s_id_and_class_are_read(client):
    headers = {"X-Request-Id": "mine", "x-llumnix-priority": "high"}
    assert said(client, **headers) == ["mine", "high", "mine", None]


@pytest.mark.parametrize(
    ("sent", "default"),
    [
        ("Bearer sk-high", "high"),
        ("bearer sk-high", "high"),
        ("Bearer sk-higher", None),
        ("Bearer ", None),
        ("Basic sk-high", None),
        ("sk-high", None),
    ],
)
def test_only_the_whole_key_after_bearer_tells_who_calls(client, sent, default):
    assert said(client, Authorization=sent)[-1] == default


def test_an_id_that_serve_made_was_not_chosen_by_the_client(client):
    assert said(client, **{"X-Request-Id": MADE_BY_SERVE})[:3] == [MADE_BY_SERVE, None, None]


@pytest.mark.parametrize("chosen", [MADE_BY_SERVE + "-1", "x" + MADE_BY_SERVE, "42", "é"])
def test_an_id_that_only_looks_a_little_like_serve_s_is_the_client_s(chosen):
    assert RequestContext(chosen).chosen_id == chosen


def test_an_unknown_class_is_a_bad_request_that_names_the_known_ones(client):
    response = client.get("/", headers={"x-llumnix-priority": "urgent"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "BadRequestError"
    assert error["param"] == "x-llumnix-priority"
    assert "'urgent'" in error["message"]
    assert "high, normal" in error["message"]


def test_one_request_s_headers_are_not_the_next_one_s(client):
    headers = {"X-Request-Id": "mine", "x-llumnix-priority": "high"}
    said(client, Authorization="Bearer sk-high", **headers)
    assert said(client) == [None, None, None, None]


async def test_what_is_not_http_passes_untouched():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    await RequestContextMiddleware(app, PRIORITIES)({"type": "lifespan"}, None, None)
    assert seen == ["lifespan"]
