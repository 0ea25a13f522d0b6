"""Requests as the tests of the ingress' journal make them."""

from vllm.v1.engine import EngineCoreOutput, FinishReason

from app.entry import Entry
from migration.snapshot import Submission


def submission(request_id: str = "engine-1", public_id: str = "mine") -> Submission:
    return Submission(request_id, public_id, b"prompt", 7, "high", "tcp://here")


def entry(*args: str, aliases: tuple[str, ...] = ()) -> Entry:
    return Entry(submission(*args), aliases)


def output(*tokens: int, finished: bool = False) -> EngineCoreOutput:
    reason = FinishReason.STOP if finished else None
    return EngineCoreOutput("engine-1", list(tokens), finish_reason=reason)


def tokens(delivered: list[EngineCoreOutput]) -> list[list[int]]:
    return [one.new_token_ids for one in delivered]
