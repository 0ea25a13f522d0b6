"""Draining: an instance takes no requests, and hands over those that it has."""

import logging
from collections.abc import Callable

from migration.snapshot import CannotMove, MigrationRecord

logger = logging.getLogger("ray.serve.llumnix")


class Drain:
    """Whether an instance drains, and what has left it since."""

    def __init__(self, replica_id: str, clock: Callable[[], float]) -> None:
        self.on = False
        self._replica_id = replica_id
        self._clock = clock
        self._for_good = self._told = False
        self._began = 0.0
        self._moved = self._blocks = 0

    def turn(self, on: bool) -> None:
        """Begin, or end it. Raises CannotMove where it is for good."""
        if self._for_good and not on:
            raise CannotMove(f"Serve stops {self._replica_id}: it takes no requests any more")
        if on == self.on:
            return
        logger.info("%s: draining %s", self._replica_id, "on" if on else "off")
        self.on, self._told = on, False
        self._began, self._moved, self._blocks = self._clock(), 0, 0

    def for_good(self, requests: int) -> None:
        """Begin it, never to end: Serve stops this instance, which has so many requests."""
        logger.info("%s: Serve stops it, %d requests to hand over", self._replica_id, requests)
        self._for_good = True
        self.turn(True)

    def observe(self, record: MigrationRecord) -> None:
        """An attempt to move a request away has ended."""
        if record.outcome == "completed":
            self._moved += 1
            self._blocks += record.blocks

    def empty(self) -> None:
        """No request is left; told once."""
        if not self.on or self._told:
            return
        self._told = True
        logger.info(
            "%s: drained in %.2f s, %d requests moved with %d KV blocks",
            self._replica_id, self._clock() - self._began, self._moved, self._blocks,
        )  # fmt: skip
