"""The ingress' journal: who is who, what there is room for, and a bounded memory of the past."""

from dataclasses import replace

from vllm.v1.engine import EngineCoreOutput

from app import journal
from app.entry import Entry
from app.journal import Journal
from tests.app.entries import entry, output, submission, tokens

MAX_TOKENS = 20


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


def test_an_ended_request_still_says_how_long_it_stood_still():
    book = Journal(MAX_TOKENS)
    it = opened(book)
    it.stalls.preempted_s = 2.0
    end(book, it)
    assert book.shown()[0].to_json()["preempted_ms"] == 2000.0


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


def test_a_name_for_the_last_of_many_siblings_is_found_at_once():
    """Their number is the client's (`n`), and nothing else is served meanwhile."""

    class Counting(dict):
        looked_up = 0

        def get(self, *args):
            Counting.looked_up += 1
            return super().get(*args)

    book = Journal(MAX_TOKENS)
    book._names = Counting()
    for number in range(500):
        opened(book, f"engine-{number}", book.free_public_id("mine"))
    assert Counting.looked_up < 3 * 500
    assert len({it.submission.public_id for it in book.live()}) == 500


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
    book.accept(it, 0, output(10))
    book.renew(it)
    assert it.submission == replace(submission(), request_id="engine-1~2")
    (delivered,) = book.accept(it, 1, EngineCoreOutput("engine-1~2", [11]))
    assert (delivered.request_id, delivered.new_token_ids) == ("engine-1", [11])


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
    book.accept(it, 1, output(11))
    book.renew(it)
    assert it.gap_since is None
    assert tokens(book.accept(it, 0, output(10))) == [[10]]


# --- its room ------------------------------------------------------------------------------------


def placed(book: Journal, request_id: str) -> Entry:
    """A request of 7 prompt tokens that a replica has."""
    it = opened(book, request_id, request_id)
    it.owned_by("a", 0)
    return it


def test_requests_can_go_on_elsewhere_as_far_as_their_prompts_find_room():
    book = Journal(MAX_TOKENS)
    assert [placed(book, name).resumable for name in "abcd"] == [True, True, False, False]


def test_a_request_that_outgrows_the_room_is_let_go_and_others_stay():
    book = Journal(MAX_TOKENS)
    stays, grows = placed(book, "stays"), placed(book, "grows")
    for first in range(8):
        book.accept(grows, first, output(first))
    assert (stays.resumable, grows.resumable) == (True, False)
    assert (len(grows.tokens), grows.output_tokens) == (0, 8)
    assert placed(book, "next").resumable, "its whole room is free again"


def test_tokens_that_are_told_twice_take_room_once():
    book = Journal(MAX_TOKENS)
    it = placed(book, "a")
    for _ in range(5):
        book.accept(it, 0, output(*range(10)))
    assert it.resumable


def test_what_fits_nowhere_can_be_submitted_until_a_replica_has_it():
    book = Journal(max_tokens=0)
    it = opened(book)
    assert it.resumable
    it.owned_by("a", 0)
    assert not it.resumable


def test_room_is_given_back_when_requests_end():
    book = Journal(MAX_TOKENS)
    for _ in range(3):
        some = [placed(book, name) for name in "abc"]
        assert [it.resumable for it in some] == [True, True, False]
        book.accept(some[0], 0, output(10, 11))
        for it in some:
            end(book, it)
    assert book._kept_tokens == 0
