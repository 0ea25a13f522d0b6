"""What an ingress knows of one request: its tokens in order, each one once, and who has it."""

from types import SimpleNamespace

import pytest
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput

from app import entry as entry_module
from app.entry import MIGRATIONS_MAX, Entry
from deployments.messages import Route
from migration.snapshot import MigrationRecord
from tests.app.entries import entry, output, submission, tokens

# --- its tokens ---------------------------------------------------------------------------------


def test_tokens_in_order_are_delivered_at_once():
    it = entry()
    assert tokens(it.accept(0, output(10))) == [[10]]
    assert tokens(it.accept(1, output(11, 12))) == [[11, 12]]
    assert list(it.tokens) == [10, 11, 12]
    assert it.state == "running"


def test_a_delta_before_its_turn_waits_for_the_missing_one():
    it = entry()
    assert it.accept(1, output(11)) == []
    assert it.accept(2, output(12)) == []
    assert it.gap_since is not None
    assert tokens(it.accept(0, output(10))) == [[10], [11], [12]]
    assert it.gap_since is None


def test_a_second_gap_keeps_waiting():
    it = entry()
    it.accept(1, output(11))
    it.accept(3, output(13))
    assert tokens(it.accept(0, output(10))) == [[10], [11]]
    assert it.gap_since is not None
    assert tokens(it.accept(2, output(12))) == [[12], [13]]
    assert it.gap_since is None


def test_duplicates_are_dropped():
    it = entry()
    it.accept(0, output(10, 11))
    assert it.accept(0, output(10)) == []
    assert it.accept(1, output(11)) == []
    assert list(it.tokens) == [10, 11]


def test_of_an_overlapping_delta_only_the_new_tokens_are_delivered():
    it = entry()
    it.accept(0, output(10, 11))
    assert tokens(it.accept(1, output(11, 12, 13))) == [[12, 13]]
    assert list(it.tokens) == [10, 11, 12, 13]


def test_a_delta_held_twice_is_delivered_once():
    it = entry()
    it.accept(1, output(11))
    it.accept(1, output(11))
    assert tokens(it.accept(0, output(10))) == [[10], [11]]


def test_of_a_held_delta_that_overlaps_only_the_new_tokens_are_delivered():
    it = entry()
    it.accept(1, output(11, 12))
    assert tokens(it.accept(0, output(10, 11))) == [[10, 11], [12]]
    assert list(it.tokens) == [10, 11, 12]


def test_a_held_delta_that_came_by_another_way_leaves_no_gap():
    it = entry()
    it.accept(1, output(11))
    it.accept(0, output(10, 11))
    assert it.held == {}
    assert it.gap_since is None


def test_the_last_token_finishes_the_request():
    it = entry()
    (last,) = it.accept(0, output(10, finished=True))
    assert last.finished
    assert (it.state, it.ended) == ("finished", True)


def test_a_last_output_without_tokens_finishes_it_too():
    it = entry()
    it.accept(0, output(10))
    assert len(it.accept(1, output(finished=True))) == 1
    assert it.ended


def test_a_last_output_that_came_too_early_finishes_it_in_its_turn():
    it = entry()
    it.accept(0, output(10))
    it.accept(2, output(12, finished=True))
    assert not it.ended
    assert tokens(it.accept(1, output(11))) == [[11], [12]]
    assert it.ended


def test_two_owners_for_a_while_deliver_every_token_once():
    """COMMIT's answer was lost, and both went on: they make the same tokens."""
    it = entry()
    delivered = []
    for first in (0, 1, 2, 1, 2, 3, 3, 4):
        delivered += it.accept(first, output(10 + first))
    assert tokens(delivered) == [[10], [11], [12], [13], [14]]


def test_what_is_held_is_bounded(monkeypatch):
    monkeypatch.setattr(entry_module, "HELD_MAX", 3)
    it = entry()
    for first in range(1, 10):
        it.accept(first, output(first))
    assert len(it.held) == 3
    assert it.gap_since is not None


# --- who has it ---------------------------------------------------------------------------------


def test_an_owner_told_twice_is_listed_once_and_a_return_again():
    it = entry()
    for replica in ("a", "a", "b", "a"):
        assert it.owned_by(replica, 0)
    assert it.replicas == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("replica", "first", "count", "may_say"),
    [
        ("a", 0, 2, True),
        ("a", 1, 2, False),
        ("a", 2, 1, False),
        ("b", 1, 1, False),
        ("b", 2, 9, True),
        ("c", 2, 1, False),
    ],
)
def test_an_owner_says_what_comes_from_its_first_token_to_the_next_owner_s(
    replica, first, count, may_say
):
    it = entry()
    it.owned_by("a", 0)
    it.owned_by("b", 2)
    assert it.may_say(replica, first, output(*range(count))) == may_say


def test_owners_are_in_the_order_of_their_tokens_whoever_of_them_is_heard_first():
    it = entry()
    for replica, first in (("a", 0), ("c", 3), ("b", 1)):
        it.owned_by(replica, first)
    assert it.replicas == ["a", "b", "c"]
    assert it.place == "c"


def test_who_says_too_late_that_it_has_a_request_has_it_not():
    it = entry()
    it.owned_by("a", 0)
    it.accept(0, output(10, 11))
    assert not it.owned_by("b", 1)
    assert it.replicas == ["a"]
    assert it.owned_by("b", 2)


def test_what_the_next_owner_will_say_is_not_kept_of_the_one_before():
    it = entry()
    it.owned_by("a", 0)
    it.accept(1, output(11))
    it.accept(2, output(99))
    it.owned_by("b", 2)
    assert tokens(it.accept(0, output(10))) == [[10], [11]]
    assert tokens(it.accept(2, output(12))) == [[12]]


def test_until_a_replica_says_that_it_has_a_request_it_is_where_it_was_sent():
    it = Entry(submission(), route=Route(chosen="a"))
    assert it.place == "a"
    it.owned_by("b", 0)
    assert it.place == "b"


# --- as it is shown ----------------------------------------------------------------------------


def test_of_attempts_to_move_it_only_the_last_ones_are_kept():
    it = entry()
    it.migrations.extend(
        MigrationRecord("r1", "a", f"b{n}", "balance", "refused") for n in range(300)
    )
    shown = it.to_json()["migrations"]
    assert len(shown) == MIGRATIONS_MAX
    assert shown[-1]["to"] == "b299"


def test_the_admin_form_has_the_contract_s_keys():
    it = entry()
    it.owned_by("a", 0)
    it.accept(0, output(10))
    record = MigrationRecord("engine-1", "a", "b", "admin", "completed", stages=1, at=1.7e9)
    it.migrations.append(record)
    shown = it.to_json()
    assert shown | {"migrations": []} == {
        "request_id": "mine",
        "state": "running",
        "priority": "high",
        "prompt_tokens": 7,
        "output_tokens": 1,
        "replicas": ["a"],
        "migrations": [],
        "recoveries": 0,
        "recovered_ms": 0.0,
        "queue_ms": 0.0,
        "preemptions": 0,
        "preempted_ms": 0.0,
        "preempted_after_move": 0,
    }
    (migration,) = shown["migrations"]
    assert (migration["from"], migration["to"], migration["stages"]) == ("a", "b", 1)
    assert migration["at"] == 1.7e9
    promised = {"from", "to", "reason", "outcome", "stages", "blocks", "bytes", "downtime_ms"}
    assert promised | {"recomputed_tokens"} <= set(migration)


@pytest.mark.parametrize("state", ["finished", "aborted", "failed"])
def test_every_end_is_an_end(state):
    it = entry()
    it.state = state
    assert it.ended


# --- how long it stood still ---------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(entry_module.time, "monotonic", lambda: clock.now)
    return clock


def preempted(*tokens: int, at: float) -> EngineCoreOutput:
    told = output(*tokens)
    told.events = [EngineCoreEvent(EngineCoreEventType.PREEMPTED, at)]
    return told


def test_a_preemption_ends_with_the_next_token(clock):
    it = entry()
    it.accept(0, output(10))
    it.accept(1, preempted(11, at=98.0))
    clock.now = 110.0
    it.accept(2, output(12))
    assert (it.to_json()["preemptions"], it.to_json()["preempted_ms"]) == (1, 2000.0)


def test_a_token_told_twice_is_one_preemption(clock):
    it = entry()
    it.accept(0, output(10))
    for _ in range(2):
        it.accept(1, preempted(11, at=98.0))
    assert it.to_json()["preemptions"] == 1


def test_a_preemption_where_it_moved_to_is_blamed_on_the_move(clock):
    it = entry()
    it.owned_by("a", 0)
    it.accept(0, preempted(10, at=100.5))
    clock.now = 101.0
    it.owned_by("b", 1)
    it.accept(1, preempted(11, at=101.5))
    assert (it.stalls.preemptions, it.stalls.preempted_after_move) == (2, 1)
