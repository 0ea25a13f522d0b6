"""What an ingress believes when the replica that holds a request's open call dies."""

import pytest

from app.fleet_client import FleetClient
from app.journal import Entry
from migration.ownership import Outcome
from migration.snapshot import Submission


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
