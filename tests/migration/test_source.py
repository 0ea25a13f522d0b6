"""The source's side of a move: it owns the request until COMMIT is acknowledged, and not longer."""

import asyncio

import pytest

from migration.ownership import Outcome
from migration.peer import PeerLost
from migration.protocol.messages import Refused, Reserved
from migration.snapshot import CannotMove, MigrationRecord
from tests.migration.fakes import (
    BLOCK,
    SHORT_S,
    TIMED_OUT,
    Destination,
    Hold,
    PeerFake,
    Source,
    let_others_run,
)


async def moved(source: Source) -> MigrationRecord:
    """One attempt, which must end."""
    async with asyncio.timeout(5):
        return await source.move()


def assert_goes_on(source: Source) -> None:
    """The request runs at the source as if nothing had happened."""
    assert source.seam.running == {"r1"}
    assert not source.seam.parked
    assert not source.owned.outcome.done()
    assert not source.owned.migrating
    assert not source.owned.committing


def assert_untouched(source: Source) -> None:
    """It never even left the batch."""
    assert_goes_on(source)
    assert "park" not in source.seam.calls


# --- a move that works --------------------------------------------------------------------------


async def test_a_completed_move_releases_the_source_once_and_names_the_new_owner():
    source = Source()
    record = await moved(source)
    assert record.outcome == "completed"
    assert source.peer.calls == ["connect", "reserve", "receive", "commit"]
    assert source.seam.calls == ["inspect", "inspect", "park", "drop"]
    assert not source.seam.owns("r1")
    assert source.owned.outcome.result() == Outcome("moved", "there")


async def test_the_record_counts_what_was_copied():
    record = await moved(Source())
    assert (record.source, record.destination, record.reason) == ("here", "there", "admin")
    assert (record.stages, record.blocks, record.bytes) == (2, 3, 3)
    assert record.downtime_ms > 0


async def test_the_source_keeps_the_request_until_the_commit_is_answered():
    source = Source()
    held = source.peer.before["commit"] = Hold()
    task = asyncio.create_task(source.move())
    await held.reached.wait()
    assert source.seam.parked == {"r1"}
    assert not source.owned.outcome.done()
    held.release()
    await task
    assert not source.seam.owns("r1")


async def test_it_goes_on_decoding_while_the_destination_reserves():
    source = Source()
    held = source.peer.before["reserve"] = Hold()
    task = asyncio.create_task(source.move())
    await held.reached.wait()
    assert source.seam.running == {"r1"}
    held.release()
    await task


async def test_blocks_that_the_destination_has_cached_are_not_sent():
    source = Source()
    source.peer.answer = Reserved(capacity=4 * BLOCK, cached_blocks=2)
    record = await moved(source)
    assert source.links.sent == [[102]]
    assert record.blocks == 1


async def test_a_request_without_kv_is_moved_without_a_copy():
    source = Source()
    source.seam.computed_tokens = 0
    record = await moved(source)
    assert record.outcome == "completed"
    assert source.peer.calls == ["connect", "reserve", "commit"]


async def test_tokens_in_flight_are_waited_for():
    source = Source()
    source.seam.steps_in_flight = 2
    assert (await moved(source)).outcome == "completed"
    assert source.seam.calls.count("park") == 3


async def test_every_attempt_has_an_id_of_its_own():
    source, ids = Source(), []
    source.peer.answer = Refused("no")
    reserve = source.peer.reserve

    async def noted(message):
        ids.append(message.migration_id)
        return await reserve(message)

    source.peer.reserve = noted
    for _ in range(3):
        await moved(source)
    assert len(set(ids)) == 3


# --- stages -------------------------------------------------------------------------------------


async def test_full_blocks_are_copied_while_it_decodes_and_the_rest_when_it_is_parked():
    source = Source()
    held = source.peer.before["receive"] = Hold()
    task = asyncio.create_task(source.move())
    await held.reached.wait()
    assert source.seam.running == {"r1"}
    source.seam.computed_tokens += 2
    held.release()
    record = await task
    assert source.links.sent == [[100, 101], [102]]
    assert record.stages == 2


async def test_stages_go_on_until_no_full_block_is_left():
    source = Source()
    growth = iter([5, 3])

    async def grows(message):
        source.seam.computed_tokens += BLOCK * next(growth, 0)
        return message.count

    source.peer.receive = grows
    source.peer.answer = Reserved(capacity=100 * BLOCK, cached_blocks=0)
    record = await moved(source)
    assert [len(blocks) for blocks in source.links.sent] == [2, 5, 3, 1]
    assert (record.outcome, record.stages) == ("completed", 4)


async def test_after_the_most_stages_it_is_suspended_whatever_is_left():
    """A link slower than the decoding: a move that never ends would serve nobody."""
    source = Source(max_stages=3)

    async def grows(message):
        source.seam.computed_tokens += 3 * BLOCK
        return message.count

    source.peer.receive = grows
    source.peer.answer = Reserved(capacity=100 * BLOCK, cached_blocks=0)
    record = await moved(source)
    assert [len(blocks) for blocks in source.links.sent] == [2, 3, 4]
    assert (record.outcome, record.stages) == ("completed", 3)


async def test_one_stage_is_a_blocking_copy():
    source = Source(max_stages=1)
    record = await moved(source)
    assert source.peer.calls == ["connect", "reserve", "commit"]
    assert source.links.sent == [[100, 101, 102]]
    assert record.stages == 1


async def test_without_stages_the_destination_computes_the_kv_again():
    source = Source(max_stages=0)
    record = await moved(source)
    assert source.links.sent == []
    assert (record.outcome, record.stages, record.bytes) == ("completed", 0, 0)
    assert record.recomputed_tokens == 40


async def test_a_request_that_grows_meanwhile_asks_for_more_blocks():
    source = Source()

    async def grows(message):
        source.seam.computed_tokens = 4 * BLOCK - 2
        return message.count

    async def extends(message):
        extended.append(message.tokens)
        return Reserved(capacity=6 * BLOCK, cached_blocks=0)

    extended = []
    source.peer.receive, source.peer.extend = grows, extends
    assert (await moved(source)).outcome == "completed"
    assert extended == [4 * BLOCK - 2 + source.seam.growth]


async def test_no_room_for_a_later_stage_leaves_the_source_untouched():
    source = Source()

    async def grows(message):
        source.seam.computed_tokens = 4 * BLOCK - 2
        return message.count

    async def refuses(message):
        return Refused("no room")

    source.peer.receive, source.peer.extend = grows, refuses
    record = await moved(source)
    assert (record.outcome, record.detail) == ("refused", "there refuses: no room")
    assert_untouched(source)
    assert source.peer.calls[-1] == "cancel"


@pytest.mark.parametrize("message", ["reserve", "receive"])
async def test_a_request_that_is_preempted_meanwhile_stays(message):
    """Its blocks were taken away: what was copied may be somebody else's by now."""
    source = Source()
    held = source.peer.before[message] = Hold()
    task = asyncio.create_task(source.move())
    await held.reached.wait()
    source.seam.preemptions += 1
    held.release()
    record = await task
    assert record.outcome == "aborted"
    assert "preempted" in record.detail
    assert_goes_on(source)
    assert source.peer.calls[-1] == "cancel"


async def test_a_request_that_is_preempted_just_before_it_is_parked_stays():
    source = Source()
    held = source.steps.hold("park")
    task = asyncio.create_task(source.move())
    await held.reached.wait()
    source.seam.preemptions += 1
    held.release()
    assert "preempted" in (await task).detail
    assert_goes_on(source)


async def test_a_request_that_finishes_between_two_stages_cancels_the_reservation():
    source = Source()
    held = source.peer.before["receive"] = Hold()
    task = asyncio.create_task(source.move())
    await held.reached.wait()
    source.seam.finish("r1")
    held.release()
    assert (await task).outcome == "aborted"
    assert "park" not in source.seam.calls
    assert source.peer.calls[-1] == "cancel"


# --- before the request is parked ---------------------------------------------------------------


async def test_a_refusal_leaves_the_source_untouched():
    source = Source()
    source.peer.answer = Refused("no room")
    record = await moved(source)
    assert record.outcome == "refused"
    assert "no room" in record.detail
    assert_untouched(source)


@pytest.mark.parametrize("message", ["connect", "reserve"])
@pytest.mark.parametrize("error", [PeerLost("gone"), RuntimeError("boom"), ConnectionError("x")])
async def test_a_failure_before_parking_leaves_the_source_untouched(message, error):
    source = Source()
    source.peer.before[message] = error
    record = await moved(source)
    assert record.outcome == "aborted"
    assert str(error) in record.detail
    assert_untouched(source)


@pytest.mark.parametrize("message", ["connect", "reserve"])
async def test_a_destination_that_does_not_answer_in_time_leaves_the_source_untouched(message):
    source = Source(timeout_s=SHORT_S)
    source.peer.before[message] = TIMED_OUT
    assert (await moved(source)).outcome == "aborted"
    assert_untouched(source)


async def test_a_step_thread_that_does_not_answer_in_time_leaves_the_source_untouched():
    source = Source(timeout_s=SHORT_S)
    source.steps.hold("inspect")
    assert (await moved(source)).outcome == "aborted"
    assert_untouched(source)


async def test_a_reservation_whose_answer_is_lost_is_cancelled():
    source = Source(timeout_s=SHORT_S)
    source.peer.after["reserve"] = TIMED_OUT
    await moved(source)
    assert "cancel" in source.peer.calls


async def test_a_request_that_cannot_move_is_not_reserved_for():
    source = Source()
    source.seam.fails["inspect"] = CannotMove("it has images")
    record = await moved(source)
    assert (record.outcome, record.detail) == ("aborted", "it has images")
    assert "reserve" not in source.peer.calls
    assert_untouched(source)


# --- between reservation and COMMIT -------------------------------------------------------------


async def test_a_request_that_finishes_before_parking_cancels_the_reservation():
    source = Source()
    held = source.peer.before["reserve"] = Hold()
    task = asyncio.create_task(source.move())
    await held.reached.wait()
    source.seam.finish("r1")
    source.owned.leave(Outcome("finished"))
    held.release()
    assert (await task).outcome == "aborted"
    assert source.peer.calls[-1] == "cancel"
    assert source.owned.outcome.result() == Outcome("finished")
    assert not source.seam.owns("r1")


@pytest.mark.parametrize(
    "error", [PeerLost("gone"), RuntimeError("boom"), ConnectionError("reset"), CannotMove("what?")]
)
async def test_a_failed_copy_puts_the_request_back_and_cancels(error):
    source = Source()
    source.peer.before["receive"] = error
    record = await moved(source)
    assert record.outcome == "aborted"
    assert str(error) in record.detail
    assert_goes_on(source)
    assert source.peer.calls[-1] == "cancel"


@pytest.mark.parametrize("error", [OSError("cut"), ValueError("odd"), KeyError("lost")])
async def test_a_failure_of_any_other_kind_is_a_record_too(error):
    source = Source()
    source.peer.before["receive"] = error
    assert (await moved(source)).outcome == "aborted"
    assert_goes_on(source)


async def test_a_copy_that_takes_too_long_is_given_up():
    source = Source(timeout_s=SHORT_S)
    source.peer.before["receive"] = TIMED_OUT
    assert (await moved(source)).outcome == "aborted"
    assert_goes_on(source)
    assert source.peer.calls[-1] == "cancel"


async def test_a_request_that_outgrew_its_reservation_goes_on_here():
    source = Source()
    source.seam.computed_tokens = 5 * BLOCK
    record = await moved(source)
    assert record.outcome == "aborted"
    assert "outgrew" in record.detail
    assert_goes_on(source)
    assert source.peer.calls[-1] == "cancel"


async def test_the_request_goes_on_before_the_destination_is_told():
    source = Source()
    source.peer.before["receive"] = ConnectionError("reset")
    held = source.peer.before["cancel"] = Hold()
    task = asyncio.create_task(source.move())
    await held.reached.wait()
    assert source.seam.running == {"r1"}
    held.release()
    await task


@pytest.mark.parametrize("obstacle", [PeerLost("gone"), RuntimeError("boom"), CannotMove("what?")])
async def test_a_cancel_that_fails_hides_neither_the_request_nor_the_reason(obstacle):
    source = Source()
    source.peer.before |= {"receive": ConnectionError("reset"), "cancel": obstacle}
    record = await moved(source)
    assert (record.outcome, record.detail) == ("aborted", "reset")
    assert_goes_on(source)


async def test_a_cancel_that_is_not_answered_is_not_waited_for():
    source = Source(timeout_s=SHORT_S)
    source.peer.before |= {"receive": ConnectionError("reset"), "cancel": TIMED_OUT}
    assert (await moved(source)).outcome == "aborted"
    assert_goes_on(source)


async def test_tokens_in_flight_that_never_land_put_the_request_back():
    """The first `park` takes it out of the batch already."""
    source = Source(timeout_s=SHORT_S)
    source.seam.steps_in_flight = 1
    run = source.steps.run

    async def only_once(command):
        if command.func.__name__ == "park" and "park" in source.seam.calls:
            await TIMED_OUT()
        return await run(command)

    source.steps.run = only_once
    assert (await moved(source)).outcome == "aborted"
    assert_goes_on(source)
    assert not source.seam.out_of_batch


async def test_a_park_that_had_begun_when_time_ran_out_is_undone():
    source = Source(timeout_s=SHORT_S)
    held = source.steps.hold_running("park")
    task = asyncio.create_task(moved(source))
    await asyncio.wait([task], timeout=3 * SHORT_S)
    held.release()
    assert (await task).outcome == "aborted"
    await let_others_run()
    assert_goes_on(source)


# --- abort --------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", ["connect", "reserve", "receive"])
async def test_an_abort_before_the_commit_ends_the_move(message):
    source = Source()
    held = source.peer.before[message] = Hold()
    task = asyncio.create_task(source.move())
    await held.reached.wait()
    await source.abort()
    held.release()
    record = await task
    assert record.outcome == "aborted"
    assert source.owned.outcome.result() == Outcome("aborted")
    assert not source.seam.owns("r1")
    assert "commit" not in source.peer.calls
    assert source.peer.calls[-1] == "cancel" or message == "connect"


async def test_an_abort_during_the_commit_is_passed_on_to_the_new_owner():
    source = Source()
    held = source.peer.before["commit"] = Hold()
    task = asyncio.create_task(source.move())
    await held.reached.wait()
    await source.abort()
    assert source.seam.parked == {"r1"}
    held.release()
    await task
    assert source.peer.calls[-1] == "abort"
    assert not source.seam.owns("r1")
    assert source.owned.outcome.result() == Outcome("aborted")


async def test_an_abort_after_the_commit_but_before_the_release_is_passed_on_too():
    source = Source()
    held = source.steps.hold("drop")
    task = asyncio.create_task(source.move())
    await held.reached.wait()
    await source.abort()
    held.release()
    await task
    assert "abort" in source.peer.calls
    assert not source.seam.owns("r1")


async def test_an_abort_during_a_commit_that_fails_ends_the_request_here():
    source = Source()
    held = source.peer.before["commit"] = Hold()
    source.peer.after["commit"] = CannotMove("no")
    task = asyncio.create_task(source.move())
    await held.reached.wait()
    await source.abort()
    held.release()
    await task
    assert not source.seam.owns("r1")
    assert source.owned.outcome.result() == Outcome("aborted")


@pytest.mark.parametrize("obstacle", [PeerLost("gone"), RuntimeError("boom"), CannotMove("what?")])
async def test_an_abort_that_cannot_be_passed_on_still_ends_the_request_here(obstacle):
    source = Source()
    held = source.peer.before["commit"] = Hold()
    source.peer.before["abort"] = obstacle
    task = asyncio.create_task(source.move())
    await held.reached.wait()
    await source.abort()
    held.release()
    await task
    assert not source.seam.owns("r1")
    assert source.owned.outcome.result() == Outcome("aborted")


# --- COMMIT -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [CannotMove("no"), PeerLost("gone")])
async def test_a_commit_that_did_not_happen_puts_the_request_back(error):
    source = Source()
    source.peer.before["commit"] = error
    assert (await moved(source)).outcome == "aborted"
    assert_goes_on(source)
    assert "cancel" in source.peer.calls


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize("error", [RuntimeError("EngineDead: x"), ConnectionError("x"), OSError()])
async def test_a_commit_that_fails_in_any_other_way_is_asked_about(error, committed):
    source = Source()
    source.peer.before["commit"] = error
    source.peer.never_commits = not committed
    record = await moved(source)
    assert record.outcome == ("completed" if committed else "aborted")
    assert source.seam.owns("r1") != committed
    assert not source.seam.parked


async def test_a_lost_answer_to_a_commit_that_happened_releases_the_source():
    source = Source(timeout_s=SHORT_S)
    source.peer.after["commit"] = TIMED_OUT
    source.peer.never_commits = False
    record = await moved(source)
    assert record.outcome == "completed"
    assert not source.seam.owns("r1")
    assert source.owned.outcome.result() == Outcome("moved", "there")


async def test_a_lost_commit_puts_the_request_back():
    source = Source(timeout_s=SHORT_S)
    source.peer.before["commit"] = TIMED_OUT
    record = await moved(source)
    assert record.outcome == "aborted"
    assert_goes_on(source)


@pytest.mark.parametrize("silence", [TIMED_OUT, PeerLost("gone"), RuntimeError("EngineDead: x")])
async def test_a_destination_that_never_says_what_became_of_the_commit_is_taken_for_dead(silence):
    source = Source(timeout_s=SHORT_S)
    source.peer.before |= {"commit": TIMED_OUT, "cancel": silence}
    assert (await moved(source)).outcome == "aborted"
    assert_goes_on(source)


async def test_a_destination_that_answers_at_last_is_believed():
    source = Source(timeout_s=SHORT_S)
    source.peer.after["commit"] = TIMED_OUT
    source.peer.never_commits = False
    cancel, asked = source.peer.cancel, []

    async def second_time(migration_id):
        asked.append(migration_id)
        if len(asked) == 1:
            await TIMED_OUT()
        return await cancel(migration_id)

    source.peer.cancel = second_time
    assert (await moved(source)).outcome == "completed"
    assert not source.seam.owns("r1")


# --- both sides together: the invariant ---------------------------------------------------------

MESSAGES = ["connect", "reserve", "receive", "commit", "cancel"]


async def moved_between_real_ends(source: Source, destination: Destination) -> MigrationRecord:
    record = await moved(source)
    await let_others_run()
    destination.now = 1e9
    await destination.incoming.expire()
    return record


def assert_exactly_one_owner(source: Source, destination: Destination) -> None:
    at_source, there = source.seam.owns("r1"), "r1" in destination.seam.running
    assert at_source + there == 1
    assert not source.seam.parked
    assert not source.seam.out_of_batch
    assert ("r1" in destination.owned) == there
    assert destination.seam.reserved == []
    assert source.owned.outcome.done() == there


def ends(timeout_s: float = 5.0) -> tuple[Source, Destination]:
    destination = Destination(timeout_s=timeout_s)
    peer = PeerFake(destination.incoming, destination.seam)
    return Source(timeout_s, peer), destination


async def test_a_move_between_real_ends():
    source, destination = ends()
    record = await moved_between_real_ends(source, destination)
    assert record.outcome == "completed"
    assert_exactly_one_owner(source, destination)
    assert destination.links.received == [[0, 1], [2]]
    assert destination.seam.installed.output_token_ids == (1, 2, 3)


@pytest.mark.parametrize("message", MESSAGES)
@pytest.mark.parametrize("lost", ["before", "after"])
@pytest.mark.parametrize("error", [RuntimeError("boom"), ConnectionError("reset"), TIMED_OUT])
async def test_whichever_message_or_answer_is_lost_there_is_exactly_one_owner(message, lost, error):
    source, destination = ends(SHORT_S if error is TIMED_OUT else 5.0)
    getattr(source.peer, lost)[message] = error
    await moved_between_real_ends(source, destination)
    assert_exactly_one_owner(source, destination)


@pytest.mark.parametrize("message", MESSAGES)
@pytest.mark.parametrize("lost", ["before", "after"])
async def test_a_lost_cancel_after_a_failed_copy_leaves_exactly_one_owner(message, lost):
    source, destination = ends(SHORT_S)
    destination.links.error = ConnectionError("reset")
    getattr(source.peer, lost)[message] = TIMED_OUT
    await moved_between_real_ends(source, destination)
    assert_exactly_one_owner(source, destination)


@pytest.mark.parametrize("message", ["connect", "reserve", "receive", "commit"])
async def test_a_destination_that_dies_leaves_the_request_at_the_source(message):
    source, _ = ends()
    for later in MESSAGES[MESSAGES.index(message) :]:
        source.peer.before[later] = PeerLost("gone")
    assert (await moved(source)).outcome == "aborted"
    assert_goes_on(source)


@pytest.mark.parametrize("command", ["reserve", "grammar", "install"])
@pytest.mark.parametrize("begun", [False, True])
async def test_a_destination_whose_step_thread_is_slow_leaves_exactly_one_owner(command, begun):
    source, destination = ends(SHORT_S)
    steps = destination.steps
    held = steps.hold_running(command) if begun else steps.hold(command)
    asked = source.peer.before["cancel"] = Hold()
    asked.release()
    task = asyncio.create_task(moved_between_real_ends(source, destination))
    reached = asyncio.create_task(asked.reached.wait())
    await asyncio.wait([task, reached], return_when=asyncio.FIRST_COMPLETED)
    await let_others_run()
    held.release()
    await task
    await let_others_run()
    await destination.incoming.expire()
    assert_exactly_one_owner(source, destination)


@pytest.mark.parametrize("message", ["connect", "reserve", "receive", "commit"])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_an_aborted_request_runs_nowhere(message, when):
    source, destination = ends()
    held = Hold()
    getattr(source.peer, when)[message] = held
    task = asyncio.create_task(moved_between_real_ends(source, destination))
    await held.reached.wait()
    await source.abort()
    held.release()
    await task
    assert not source.seam.owns("r1")
    assert destination.seam.running == set()
    assert destination.seam.reserved == []
