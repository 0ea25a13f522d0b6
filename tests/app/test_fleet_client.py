"""What an ingress believes of its requests: where they are, and when they moved."""

from types import SimpleNamespace

import pytest

from app import fleet_client
from app.fleet_client import FleetClient
from app.journal import Entry, Journal
from migration.ownership import Outcome
from migration.snapshot import MigrationRecord, Submission


def entry(*replicas: str) -> Entry:
    submission = Submission("r1", "public", b"", 10, "normal", "tcp://here")
    return Entry(submission, aliases=(), replicas=list(replicas))


async def died(told: Entry, *new_owners: str) -> Outcome:
    """An open call that ends with its replica, after owners have said that they are."""
    for replica in new_owners:
        told.moved_to(replica)
    raise ConnectionError("the replica died")


async def left(told: Entry, *new_owners: str) -> Outcome:
    return await FleetClient._left(None, told, died(told, *new_owners))  # type: ignore[arg-type]


async def test_a_source_that_dies_after_the_commit_has_handed_its_request_over():
    assert await left(entry("a"), "b") == Outcome("moved", "b")
    assert await left(entry(), "a", "b") == Outcome("moved", "b")


async def test_a_request_dies_with_the_replica_that_owns_it():
    for told, owners in ((entry("a"), ()), (entry(), ("a",)), (entry(), ()), (entry("a", "b"), ())):
        with pytest.raises(ConnectionError):
            await left(told, *owners)


async def test_a_move_is_dated_by_the_clock_of_the_ingress_that_hears_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    journal, moved = Journal(), entry("a")
    journal.open(moved)
    messages = [MigrationRecord("r1", "a", "b", "balance", "completed", at=5.0)]

    async def receive() -> MigrationRecord:
        if not messages:
            raise EOFError
        return messages.pop()

    monkeypatch.setattr(fleet_client.time, "time", lambda: 1.7e9)
    client = SimpleNamespace(journal=journal, _inbox=SimpleNamespace(receive=receive))
    with pytest.raises(EOFError):
        await FleetClient._pump(client)  # type: ignore[arg-type]

    assert [(move.destination, move.at) for move in moved.migrations] == [("b", 1.7e9)]
