"""Refusals: 429, 503 or 400 in place of an answer, or as the end of a stream that has begun.

vLLM's server starts a stream with its status 200 before the engine is asked, so it could not refuse
one any more. The middleware keeps that start back until there is something to send.
"""

from contextvars import ContextVar
from dataclasses import dataclass, field

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.request_context import openai_error

_KINDS = {400: "BadRequestError", 429: "RateLimitError", 503: "ServiceUnavailableError"}


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a client gets instead of (more) tokens. `status` is one of _KINDS."""

    status: int
    message: str
    retry_after_s: int | None = None

    def response(self) -> JSONResponse:
        """In OpenAI's form."""
        response = openai_error(self.status, self.message, _KINDS[self.status])
        if self.retry_after_s is not None:
            response.headers["retry-after"] = str(self.retry_after_s)
        return response

    async def send(self, begun: bool, scope: Scope, receive: Receive, send: Send) -> None:
        """All that the client gets (from now on)."""
        if not begun:
            await self.response()(scope, receive, send)
            return
        error = bytes(self.response().body)
        last = b"data: %b\n\ndata: [DONE]\n\n" % error
        await send({"type": "http.response.body", "body": last, "more_body": False})


@dataclass(slots=True, eq=False)
class Answer:
    """The answer to one HTTP request, as FleetClient and the middleware share it.

    `admitted`: one of its engine requests was let in, and so are the others (n > 1, several
    prompts). `begun`: the client has a part of it. `running`: ids of its engine requests. `http`:
    False where AsyncLLM was called by something else.
    """

    http: bool = True
    admitted: bool = False
    begun: bool = False
    refusal: Refusal | None = None
    running: set[str] = field(default_factory=set)

    def refuse(self, refusal: Refusal) -> bool:
        """Make it this, or end it with this. False where there is no such answer."""
        if self.http and self.refusal is None:
            self.refusal = refusal
        return self.http


current: ContextVar[Answer] = ContextVar("answer")
"""Not set outside of HTTP. The tasks that vLLM makes for a request inherit it."""


class RefusalMiddleware:
    """Sends the refusal that FleetClient notes, and drops what vLLM answers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = Answer()
        current.set(answer)
        held: list[Message] = []
        refused = False

        async def send_or_refuse(message: Message) -> None:
            nonlocal refused
            if answer.refusal is not None:
                if not refused:
                    refused = True
                    await answer.refusal.send(answer.begun, scope, receive, send)
            elif answer.begun:
                await send(message)
            else:
                held.append(message)
                if not _may_wait(message, scope, answer):
                    answer.begun = True
                    for one in held:
                        await send(one)

        await self._app(scope, receive, send_or_refuse)


def _may_wait(message: Message, scope: Scope, answer: Answer) -> bool:
    """The start, and what a stream says before its request is admitted (/v1/responses)."""
    if message["type"] == "http.response.start":
        return True
    return bool(message.get("more_body")) and scope["method"] == "POST" and not answer.admitted
