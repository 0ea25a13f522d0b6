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

    def response(self, anthropic: bool) -> JSONResponse:
        """In the form of the API that was asked, OpenAI's or Anthropic's."""
        kind = _KINDS[self.status]
        if anthropic:
            error = {"type": kind, "message": self.message}
            response = JSONResponse({"type": "error", "error": error}, self.status)
        else:
            response = openai_error(self.status, self.message, kind)
        if self.retry_after_s is not None:
            response.headers["retry-after"] = str(self.retry_after_s)
        return response

    async def send(self, begun: bool, scope: Scope, receive: Receive, send: Send) -> None:
        """All that the client gets (from now on)."""
        anthropic = scope["path"].endswith("/v1/messages")
        response = self.response(anthropic)
        if not begun:
            await response(scope, receive, send)
            return
        form = b"event: error\ndata: %b\n\n" if anthropic else b"data: %b\n\ndata: [DONE]\n\n"
        last = form % bytes(response.body)
        await send({"type": "http.response.body", "body": last, "more_body": False})


@dataclass(slots=True, eq=False)
class Answer:
    """The answer to one HTTP request, as FleetClient and the middleware share it.

    `admitted`: one of its engine requests was let in, and so are the others (n > 1, several
    prompts). `placed`: the class and vLLM priority of all of them. `begun`: the client has a part
    of it. `running`: ids of its engine requests. `http`: False where AsyncLLM was called by
    something else, or where the answer is over (what goes on in the background has none).
    """

    http: bool = True
    admitted: bool = False
    placed: tuple[str, int] | None = None
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
        answer.http = False


def _may_wait(message: Message, scope: Scope, answer: Answer) -> bool:
    """The start, and what a stream says before its request is admitted (/v1/responses)."""
    if message["type"] == "http.response.start":
        return True
    return bool(message.get("more_body")) and scope["method"] == "POST" and not answer.admitted
