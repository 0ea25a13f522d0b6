"""What an HTTP request says beside its body: its id, its priority class and who sends it."""

import re
from contextvars import ContextVar
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from app.priorities import Caller, Priorities

ID_HEADER = "x-request-id"
PRIORITY_HEADER = "x-llumnix-priority"

_MADE_BY_SERVE = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""Serve's proxies give a request without an id one of this form, before it gets to us."""


@dataclass(frozen=True, slots=True)
class RequestContext:
    """`request_id` is the X-Request-Id header; `priority_class` is None unless the client named
    one, `caller` unless it sent an API key of some class.
    """

    request_id: str | None = None
    priority_class: str | None = None
    caller: Caller | None = None

    @property
    def chosen_id(self) -> str | None:
        """The id, if the client chose it rather than Serve."""
        made = self.request_id is None or _MADE_BY_SERVE.fullmatch(self.request_id)
        return None if made else self.request_id


_NONE = RequestContext()
current: ContextVar[RequestContext] = ContextVar("request_context", default=_NONE)


def openai_error(status: int, message: str, kind: str, param: str | None = None) -> JSONResponse:
    """An error in OpenAI's form."""
    body = {"message": message, "type": kind, "param": param, "code": status}
    return JSONResponse({"error": body}, status)


class RequestContextMiddleware:
    """Reads our headers into `current`. Serve answers with the X-Request-Id by itself."""

    def __init__(self, app: ASGIApp, priorities: Priorities) -> None:
        self._app = app
        self._priorities = priorities

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            name = headers.get(PRIORITY_HEADER)
            if name is not None and name not in self._priorities.names:
                known = ", ".join(self._priorities.names)
                message = f"unknown priority class {name!r}; known classes: {known}"
                error = openai_error(400, message, "BadRequestError", PRIORITY_HEADER)
                await error(scope, receive, send)
                return
            caller = self._priorities.caller(headers.get("authorization"))
            current.set(RequestContext(headers.get(ID_HEADER), name, caller))
        await self._app(scope, receive, send)
