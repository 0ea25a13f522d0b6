"""What a source asks of a destination, and of its own engine: the seams of the protocol."""

from collections.abc import Callable
from typing import Protocol, TypeVar

from migration.protocol.messages import Commit, Extend, Refused, Reserve, Reserved, Stage

T = TypeVar("T")


class PeerLost(Exception):
    """The other instance died or cannot be reached; what was asked may have happened, or not."""


class Peer(Protocol):
    """The destination's side of the protocol. Calls raise PeerLost, TimeoutError or CannotMove."""

    async def connect(self, group: str) -> None:
        """Join the pair group as its receiving end."""

    async def reserve(self, message: Reserve) -> Reserved | Refused:
        """PRE-ALLOC of the first stage."""

    async def extend(self, message: Extend) -> Reserved | Refused:
        """PRE-ALLOC of a later stage."""

    async def receive(self, message: Stage) -> int:
        """Take the blocks of a stage; answers the bytes received."""

    async def commit(self, message: Commit) -> None:
        """Become the owner. Raises CannotMove where that did not, and will not, happen."""

    async def cancel(self, migration_id: str) -> bool:
        """Give up: True if this migration will never commit, False if it has committed."""

    async def abort(self, request_id: str) -> None:
        """Abort the request, whose client is gone."""


class StepThread(Protocol):
    """Runs commands between two engine steps."""

    async def run(self, command: Callable[[], T]) -> T:
        """Run it there and answer its result."""
