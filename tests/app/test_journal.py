"""The ingress' journal: tokens in order, each one once, and a bounded memory of what ended."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, FinishReason

from app import journal
from app.journal import Entry, Journal
from deployments.messages import Route
from migration.snapshot import MigrationRecord, Submission

MAX_TOKENS = 20


def submission(request_id: str = "engine-1", public_id: str = "mine") -> Submission:
    return Submission(request_id, public_id, b"prompt", 7, "high", "tcp://here")


def entry(*args: str, aliases: tuple[str, ...] = ()) -> Entry:
    return Entry(submission(*args), aliases)


def output(*tokens: int, finished: bool = False) -> EngineCoreOutput:
    reason = FinishReason.STOP if finished else None
    return EngineCoreOutput("engine-1", list(tokens), finish_reason=reason)


def tokens(delivered: list[EngineCoreOutput]) -> list[list[int]]:
    return [one.new_token_ids for one in delivered]


# --- one request ---------------------------------------------------------------------------------


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
    monkeypatch.setattr(journal, "HELD_MAX", 3)
    it = entry()
    for first in range(1, 10):
        it.accept(first, output(first))
    assert len(it.held) == 3
    assert it.gap_since is not None


def test_an_owner_told_twice_is_listed_once_and_a_return_again():
    it = entry()
    for replica in ("a", "a", "b", "a"):
        it.owned_by(replica)
    assert it.replicas == ["a", "b", "a"]


def test_until_a_replica_says_that_it_has_a_request_it_is_where_it_was_sent():
    it = Entry(submission(), route=Route(chosen="a"))
    assert it.place == "a"
    it.owned_by("b")
    assert it.place == "b"


def test_the_admin_form_has_the_contract_s_keys():
    it = entry()
    it.owned_by("a")
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


# --- how long it stood still ---------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(journal.time, "monotonic", lambda: clock.now)
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
    it.owned_by("a")
    it.accept(0, preempted(10, at=100.5))
    clock.now = 101.0
    it.owned_by("b")
    it.accept(1, preempted(11, at=101.5))
    assert (it.stalls.preemptions, it.stalls.preempted_after_move) == (2, 1)


def test_an_ended_request_still_says_how_long_it_stood_still(clock):
    book = Journal(MAX_TOKENS)
    it = opened(book)
    it.accept(0, preempted(10, at=98.0))
    end(book, it)
    assert book.shown()[0].to_json()["preempted_ms"] == 2000.0


# --- all requests --------------------------------------------------------------------------------


def opened(book: Journal, *args: str, aliases: tuple[str, ...] = ()) -> Entry:
    it = entry(*args, aliases=aliases)
    book.open(it)
    return it


def end(book: Journal, it: Entry) -> None:
    it.state = "finished"
    book.close(it)


def test_an_open_request_is_found_by_every_name():
    book = Journal(MAX_TOKENS)
    it = opened(book, "engine-1", "mine", aliases=("cmpl-1", "from-serve"))
    assert book.get("engine-1") is it
    assert [book.find(name) for name in ("mine", "cmpl-1", "from-serve")] == [it, it, it]
    assert book.find("engine-1") is None
    assert (book.live(), book.shown()) == ([it], [it])


def test_an_ended_request_is_shown_but_no_longer_live():
    book = Journal(MAX_TOKENS)
    it = opened(book)
    end(book, it)
    assert book.get("engine-1") is None
    assert book.find("mine") is it
    assert (book.live(), book.shown()) == ([], [it])


def test_running_requests_are_shown_first_then_the_last_that_ended():
    book = Journal(MAX_TOKENS)
    first, second, third = (opened(book, str(n), f"public-{n}") for n in range(3))
    end(book, first)
    end(book, second)
    assert book.shown() == [third, second, first]


def test_closing_twice_changes_nothing():
    book = Journal(MAX_TOKENS)
    it = opened(book)
    end(book, it)
    end(book, it)
    assert book.shown() == [it]


def test_an_ended_request_keeps_its_counts_but_neither_its_tokens_nor_its_prompt():
    book = Journal(MAX_TOKENS)
    it = opened(book)
    it.accept(0, output(10, 11))
    it.accept(5, output(15))
    end(book, it)
    assert (list(it.tokens), it.held) == ([], {})
    assert it.to_json()["output_tokens"] == 2
    assert it.to_json()["prompt_tokens"] == 7
    assert it.submission == replace(submission(), request=b"")


def test_only_the_last_that_ended_are_kept(monkeypatch):
    monkeypatch.setattr(journal, "ENDED_KEPT", 2)
    book = Journal(MAX_TOKENS)
    for number in range(4):
        end(book, opened(book, str(number), f"public-{number}", aliases=(f"cmpl-{number}",)))
    assert [it.submission.public_id for it in book.shown()] == ["public-3", "public-2"]
    assert book.find("public-0") is book.find("cmpl-1") is None
    assert book.find("cmpl-2") is not None
    assert len(book._names) == 4


def test_a_name_that_was_taken_over_survives_its_first_bearer(monkeypatch):
    monkeypatch.setattr(journal, "ENDED_KEPT", 1)
    book = Journal(MAX_TOKENS)
    end(book, opened(book, "1", "mine"))
    second = opened(book, "2", "mine")
    end(book, opened(book, "3", "other"))
    assert book.find("mine") is second


def test_siblings_get_public_ids_of_their_own():
    book = Journal(MAX_TOKENS)
    for number, wanted in enumerate(["mine", "mine.1", "mine.2"]):
        assert book.free_public_id("mine") == wanted
        opened(book, str(number), wanted)


def test_the_public_id_of_an_ended_request_is_free_again():
    book = Journal(MAX_TOKENS)
    end(book, opened(book, "1", "mine"))
    assert book.free_public_id("mine") == "mine"


def test_a_shared_name_means_the_sibling_that_still_runs():
    book = Journal(MAX_TOKENS)
    first = opened(book, "1", "mine", aliases=("cmpl-1",))
    second = opened(book, "2", "mine.1", aliases=("cmpl-1",))
    assert book.find("cmpl-1") is first
    end(book, first)
    assert book.find("cmpl-1") is second


@pytest.mark.parametrize("state", ["finished", "aborted", "failed"])
def test_every_end_is_an_end(state):
    it = entry()
    it.state = state
    assert it.ended


def test_an_ended_request_is_still_known_by_its_engine_id():
    book = Journal(MAX_TOKENS)
    it = opened(book)
    end(book, it)
    assert book.get("engine-1") is None
    assert book.known("engine-1") is it


# --- a request that was lost ---------------------------------------------------------------------


def test_a_lost_request_has_another_id_inside_the_engines_and_its_own_for_vllm():
    book = Journal(MAX_TOKENS)
    it = opened(book)
    book.accept("engine-1", 0, output(10))
    book.renew(it)
    assert it.submission == replace(submission(), request_id="engine-1~2")
    assert book.accept("engine-1", 1, output(99)) == (None, [])
    whose, (delivered,) = book.accept("engine-1~2", 1, output(11))
    assert (whose, delivered.request_id, delivered.new_token_ids) == (it, "engine-1", [11])


def test_a_request_is_known_by_all_its_ids_and_lives_once():
    book = Journal(MAX_TOKENS)
    it = opened(book)
    book.renew(it)
    book.renew(it)
    ids = ("engine-1", "engine-1~2", "engine-1~3")
    assert [book.known(name) for name in ids] == [it, it, it]
    assert [book.present(name) for name in ids] == [None, None, it]
    assert book.get("engine-1") is it
    assert (book.live(), book.shown(), book.find("mine")) == ([it], [it], it)


def test_nothing_is_left_of_its_ids_but_the_last_one_when_it_ends():
    book = Journal(MAX_TOKENS)
    it = opened(book)
    book.renew(it)
    end(book, it)
    assert book._live == {}
    assert [book.known(name) for name in ("engine-1", "engine-1~2")] == [None, it]
    assert book.shown() == [it]


def test_what_waited_for_a_token_that_was_lost_is_dropped_with_it():
    book = Journal(MAX_TOKENS)
    it = opened(book)
    book.accept("engine-1", 1, output(11))
    book.renew(it)
    assert it.gap_since is None
    _, delivered = book.accept("engine-1~2", 0, output(10))
    assert tokens(delivered) == [[10]]


# --- its room ------------------------------------------------------------------------------------


def placed(book: Journal, request_id: str) -> Entry:
    """A request of 7 prompt tokens that a replica has."""
    it = opened(book, request_id, request_id)
    it.owned_by("a")
    return it


def test_requests_can_go_on_elsewhere_as_far_as_their_prompts_find_room():
    book = Journal(MAX_TOKENS)
    assert [placed(book, name).resumable for name in "abcd"] == [True, True, False, False]


def test_a_request_that_outgrows_the_room_is_let_go_and_others_stay():
    book = Journal(MAX_TOKENS)
    stays, grows = placed(book, "stays"), placed(book, "grows")
    for first in range(8):
        book.accept("grows", first, output(first))
    assert (stays.resumable, grows.resumable) == (True, False)
    assert (len(grows.tokens), grows.output_tokens) == (0, 8)
    assert placed(book, "next").resumable, "its whole room is free again"


def test_tokens_that_are_told_twice_take_room_once():
    book = Journal(MAX_TOKENS)
    it = placed(book, "a")
    for _ in range(5):
        book.accept("a", 0, output(*range(10)))
    assert it.resumable


def test_what_fits_nowhere_can_be_submitted_until_a_replica_has_it():
    book = Journal(max_tokens=0)
    it = opened(book)
    assert it.resumable
    it.owned_by("a")
    assert not it.resumable


def test_room_is_given_back_when_requests_end():
    book = Journal(MAX_TOKENS)
    for _ in range(3):
        some = [placed(book, name) for name in "abc"]
        assert [it.resumable for it in some] == [True, True, False]
        book.accept("a", 0, output(10, 11))
        for it in some:
            end(book, it)
    assert book._kept_tokens == 0
