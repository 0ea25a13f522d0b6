"""A request as the llumlet owns it, and how it left."""

import asyncio
from dataclasses import dataclass, field
from typing import Literal

from migration.snapshot import Submission


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request left an instance; the answer to the ingress' open call.

    `destination` is the new owner of a request that moved. `unknown`: it is not here (any more).
    `refused`: it cannot go on from its tokens; `detail` says why.
    """

    kind: Literal["finished", "aborted", "moved", "unknown", "refused"]
    destination: str | None = None
    detail: str = ""


@dataclass(slots=True, eq=False)
class Owned:
    """One request that this instance owns. Touched on the replica's event loop only.

    `committing`: COMMIT was sent; from then on an abort is passed on instead of being carried out.
    `unattached_since`: monotonic seconds since when no ingress' call has been open for it.
    """

    submission: Submission
    outcome: asyncio.Future[Outcome] = field(default_factory=asyncio.Future)
    migrating: bool = False
    committing: bool = False
    aborted: bool = False
    unattached_since: float | None = None

    def leave(self, outcome: Outcome) -> None:
        """Answer the ingress; the first answer counts."""
        if not self.outcome.done():
            self.outcome.set_result(outcome)
