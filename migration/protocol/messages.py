"""What source and destination say to each other."""

from dataclasses import dataclass

from migration.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Reserve:
    """Source -> destination, PRE-ALLOC of the first stage: hold blocks for `tokens` tokens of KV.

    `snapshot` is the request as it stands; it goes on decoding meanwhile.
    """

    migration_id: str
    source: str
    snapshot: Snapshot
    tokens: int


@dataclass(frozen=True, slots=True)
class Extend:
    """Source -> destination, PRE-ALLOC of a later stage: hold blocks for `tokens` tokens of KV."""

    migration_id: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Reserved:
    """Destination -> source, ACK: blocks are held for `capacity` tokens of KV.

    The destination has the first `cached_blocks` in its prefix cache: they need not be sent.
    """

    capacity: int
    cached_blocks: int


@dataclass(frozen=True, slots=True)
class Refused:
    """Destination -> source: no, and why. Nothing was changed."""

    reason: str


@dataclass(frozen=True, slots=True)
class Stage:
    """Source -> destination: take `count` blocks, from the request's block `first` on.

    They come over the pair group `group` at the same time.
    """

    migration_id: str
    group: str
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Commit:
    """Source -> destination: once the last stage's bytes are in place, the request is yours."""

    migration_id: str
    snapshot: Snapshot
    last: Stage | None
