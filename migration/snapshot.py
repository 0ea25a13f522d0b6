"""A request as it can be continued elsewhere, and the record of a move."""

from dataclasses import dataclass, replace

import msgspec


@dataclass(frozen=True, slots=True)
class Submission:
    """A request as the ingress hands it to an instance; it travels along with every move.

    `request` is vLLM's EngineCoreRequest in vLLM's own msgpack, so that every instance decodes the
    very same request. `request_id` names it inside the engines, `public_id` outside (X-Request-Id).
    A request that is taken over from a lost instance has a new `request_id`: whatever that one, or
    a move that it had begun, may still say of the old one concerns nobody any more.
    `ingress` is the ZMQ address that its tokens go to. `fingerprint`: of the model and the engine
    configuration that it was prepared for, and that alone may run it.
    """

    request_id: str
    public_id: str
    request: bytes
    prompt_tokens: int
    priority_class: str
    ingress: str
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that another instance needs to continue a request exactly, but for the KV blocks.

    `computed_tokens` is how many leading tokens have their KV in the blocks that travel beside the
    snapshot; with 0 the destination computes them again. `generator` is the state of a seeded
    request's torch.Generator. `events` are vLLM's (type, seconds ago) not told to the client.
    """

    submission: Submission
    output_token_ids: tuple[int, ...] = ()
    computed_tokens: int = 0
    preemptions: int = 0
    generator: bytes | None = None
    events: tuple[tuple[int, float], ...] = ()

    def without_kv(self) -> "Snapshot":
        """The same, but for the destination to compute the KV again."""
        return replace(self, computed_tokens=0)


class MigrationRecord(msgspec.Struct, frozen=True):
    """How one attempt to move a request went; shown by the admin API.

    `outcome`: completed | refused | aborted; `detail` says why where it did not complete.
    `stages` counts copies of KV blocks, the last one included. `downtime_ms`: from parking at the
    source to the destination's commit. `at`: when its ingress heard of it, in Unix seconds.
    """

    request_id: str
    source: str
    destination: str
    reason: str
    outcome: str
    detail: str = ""
    stages: int = 0
    blocks: int = 0
    bytes: int = 0
    downtime_ms: float = 0.0
    recomputed_tokens: int = 0
    at: float = 0.0

    def to_json(self) -> dict[str, object]:
        """The admin API's form (design.md §5): `from` and `to` name the replicas."""
        fields = msgspec.structs.asdict(self)
        fields["from"] = fields.pop("source")
        fields["to"] = fields.pop("destination")
        del fields["request_id"]
        return fields


class CannotMove(Exception):
    """The request stays where it is; the message says why, for the user."""


class UnknownRequest(CannotMove):
    """No such request runs here: it ended, moved on, or never was."""
