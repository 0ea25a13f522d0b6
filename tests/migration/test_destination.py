"""The destination's side of a move: its reservations are real, bounded and leased."""

import asyncio
from concurrent.futures import Future
from dataclasses import replace

import pytest

from migration.protocol.messages import Extend, Refused, Reserved
from migration.snapshot import CannotMove
from tests.migration.fakes import (
    BLOCK,
    SHORT_S,
    TIMEOUT_S,
    Destination,
    Hold,
    commit,
    let_others_run,
    reserve,
    stage,
)


async def reserved(**kwargs) -> Destination:
    """A destination that holds blocks for migration m1 of request r1."""
    destination = Destination(**kwargs)
    assert isinstance(await destination.incoming.reserve(reserve()), Reserved)
    return destination


async def test_a_reservation_says_what_fits_and_what_is_cached():
    destination = Destination()
    destination.seam.cached_blocks = 2
    answer = await destination.incoming.reserve(reserve())
    assert answer == Reserved(capacity=4 * BLOCK, cached_blocks=2)
    assert len(destination.incoming) == 1
    assert destination.owned == {}


async def test_a_reserved_request_that_is_committed_is_owned_here():
    destination = await reserved()
    await destination.incoming.commit(commit())
    assert destination.seam.running == {"r1"}
    assert destination.seam.installed == commit().snapshot
    assert set(destination.owned) == {"r1"}
    assert len(destination.incoming) == 0


async def test_a_request_is_owned_before_the_engine_can_finish_it():
    destination = await reserved()
    held = destination.steps.hold("install")
    task = asyncio.create_task(destination.incoming.commit(commit()))
    await held.reached.wait()
    assert set(destination.owned) == {"r1"}
    held.release()
    await task


async def test_what_the_engine_refuses_is_refused_and_not_held():
    destination = Destination()
    destination.seam.refusal = "no room"
    assert await destination.incoming.reserve(reserve()) == Refused("no room")
    assert len(destination.incoming) == 0


async def test_what_the_engine_cannot_move_is_refused():
    destination = Destination()
    destination.seam.fails["reserve"] = CannotMove("too exotic")
    assert await destination.incoming.reserve(reserve()) == Refused("too exotic")
    assert len(destination.incoming) == 0


async def test_an_engine_that_fails_to_reserve_leaves_no_slot_taken():
    destination = Destination(at_once=1)
    destination.seam.fails["reserve"] = RuntimeError("broken")
    with pytest.raises(RuntimeError):
        await destination.incoming.reserve(reserve())
    assert len(destination.incoming) == 0


async def test_more_moves_than_allowed_at_once_are_refused():
    destination = await reserved(at_once=1)
    assert isinstance(await destination.incoming.reserve(reserve("m2", "r2")), Refused)
    assert destination.seam.calls.count("reserve") == 1


async def test_a_reservation_being_made_counts_for_the_limit():
    destination = Destination(at_once=1)
    held = destination.steps.hold("reserve")
    first = asyncio.create_task(destination.incoming.reserve(reserve()))
    await held.reached.wait()
    assert isinstance(await destination.incoming.reserve(reserve("m2", "r2")), Refused)
    held.release()
    assert isinstance(await first, Reserved)


async def test_an_ended_move_makes_room_for_the_next():
    destination = await reserved(at_once=1)
    await destination.incoming.cancel("m1")
    assert isinstance(await destination.incoming.reserve(reserve("m2")), Reserved)


async def test_a_second_move_of_a_request_that_is_reserved_already_is_refused():
    """The engine keeps blocks by request: two reservations of one request would share them."""
    destination = await reserved()
    assert isinstance(await destination.incoming.reserve(reserve("m2", "r1")), Refused)


async def test_a_second_move_of_a_request_whose_blocks_are_still_written_to_is_refused():
    destination = await reserved()
    copy = destination.links.copy = Hold()
    receiving = asyncio.create_task(destination.incoming.receive(stage(0, 2)))
    await copy.reached.wait()
    cancelling = asyncio.create_task(destination.incoming.cancel("m1"))
    await let_others_run()
    assert isinstance(await destination.incoming.reserve(reserve("m2", "r1")), Refused)
    copy.release()
    await asyncio.gather(receiving, cancelling)


async def test_a_second_move_of_a_request_that_is_being_reserved_is_refused():
    destination = Destination()
    held = destination.steps.hold("reserve")
    first = asyncio.create_task(destination.incoming.reserve(reserve()))
    await held.reached.wait()
    held.release()
    second = await destination.incoming.reserve(reserve("m2", "r1"))
    assert {type(await first), type(second)} == {Reserved, Refused}


async def test_blocks_are_received_into_those_reserved_from_the_first_one_on():
    destination = await reserved()
    assert await destination.incoming.receive(stage(1, 2)) == 2
    assert destination.links.received == [[1, 2]]


async def test_more_blocks_than_are_reserved_are_not_taken():
    destination = await reserved()
    with pytest.raises(CannotMove, match="reserved"):
        await destination.incoming.receive(stage(3, 2))
    assert destination.links.received == []


@pytest.mark.parametrize("message", ["receive", "commit"])
async def test_a_move_that_was_never_reserved_is_unknown(message):
    incoming = Destination().incoming
    calls = {"receive": lambda: incoming.receive(stage(0, 1))}
    calls["commit"] = lambda: incoming.commit(commit())
    with pytest.raises(CannotMove, match="knows nothing"):
        await calls[message]()


async def test_a_reservation_without_word_from_its_source_is_given_back():
    destination = await reserved()
    destination.now = TIMEOUT_S + 1
    await destination.incoming.expire()
    assert destination.seam.reserved == []
    with pytest.raises(CannotMove):
        await destination.incoming.commit(commit())


async def test_a_reservation_within_its_lease_stays():
    destination = await reserved()
    destination.now = TIMEOUT_S - 1
    await destination.incoming.expire()
    assert len(destination.seam.reserved) == 1
    await destination.incoming.commit(commit())


async def test_a_request_that_was_committed_does_not_expire():
    destination = await reserved()
    await destination.incoming.commit(commit())
    destination.now = 100 * TIMEOUT_S
    await destination.incoming.expire()
    assert destination.seam.running == {"r1"}
    assert "cancel" not in destination.seam.calls


async def test_a_cancelled_move_gives_its_blocks_back_and_will_never_commit():
    destination = await reserved()
    assert await destination.incoming.cancel("m1") is True
    assert destination.seam.reserved == []
    with pytest.raises(CannotMove):
        await destination.incoming.commit(commit())
    assert destination.owned == {}


async def test_cancelling_twice_gives_back_once():
    destination = await reserved()
    assert await destination.incoming.cancel("m1") is True
    assert await destination.incoming.cancel("m1") is True
    assert destination.seam.calls.count("cancel") == 1


async def test_a_cancel_of_what_was_never_reserved_is_a_promise_too():
    destination = Destination()
    assert await destination.incoming.cancel("m1") is True


async def test_a_cancel_that_overtakes_its_reservation_leaves_nothing_reserved():
    destination = Destination()
    held = destination.steps.hold("reserve")
    task = asyncio.create_task(destination.incoming.reserve(reserve()))
    await held.reached.wait()
    assert await destination.incoming.cancel("m1") is True
    held.release()
    await asyncio.gather(task, return_exceptions=True)
    await let_others_run()
    assert destination.seam.reserved == []
    assert len(destination.incoming) == 0


async def test_a_reservation_whose_source_hung_up_meanwhile_is_not_lost():
    """What the step thread had begun must be given back, now or when the lease ends."""
    destination = Destination()
    held = destination.steps.hold_running("reserve")
    task = asyncio.create_task(destination.incoming.reserve(reserve()))
    await held.reached.wait()
    task.cancel()
    await let_others_run()
    held.release()
    await asyncio.gather(task, return_exceptions=True)
    await let_others_run()
    destination.now = TIMEOUT_S + 1
    await destination.incoming.expire()
    assert destination.seam.reserved == []
    assert len(destination.incoming) == 0


async def test_a_cancel_after_the_commit_says_that_it_has_committed():
    destination = await reserved()
    await destination.incoming.commit(commit())
    assert await destination.incoming.cancel("m1") is False
    assert destination.seam.running == {"r1"}


async def test_a_doubled_commit_changes_nothing():
    destination = await reserved()
    await destination.incoming.commit(commit())
    await destination.incoming.commit(commit())
    assert destination.seam.calls.count("install") == 1
    assert len(destination.owned) == 1


async def test_a_cancel_during_the_commit_tells_the_truth():
    """The step thread was slow, COMMIT timed out at the source, and it asks what became of it."""
    destination = await reserved()
    held = destination.steps.hold("install")
    committing = asyncio.create_task(destination.incoming.commit(commit()))
    await held.reached.wait()
    cancelling = asyncio.create_task(destination.incoming.cancel("m1"))
    await let_others_run()
    held.release()
    await asyncio.gather(committing, return_exceptions=True)
    never_commits = await cancelling
    assert never_commits == ("r1" not in destination.seam.running)
    assert destination.seam.reserved == []


@pytest.mark.parametrize("begun", [False, True])
async def test_a_commit_whose_source_hung_up_is_carried_out_or_undone_but_not_forgotten(begun):
    """Over gRPC a caller's timeout cancels the call here."""
    destination = await reserved()
    steps = destination.steps
    held = steps.hold_running("install") if begun else steps.hold("install")
    committing = asyncio.create_task(destination.incoming.commit(commit()))
    await held.reached.wait()
    committing.cancel()
    await let_others_run()
    cancelling = asyncio.create_task(destination.incoming.cancel("m1"))
    await let_others_run()
    held.release()
    await asyncio.gather(committing, return_exceptions=True)
    never_commits = await cancelling
    await let_others_run()
    runs_here = "r1" in destination.seam.running
    assert never_commits != runs_here
    assert ("r1" in destination.owned) == runs_here
    assert destination.seam.reserved == []


async def test_a_failed_install_disowns_the_request_and_gives_its_blocks_back():
    destination = await reserved()
    destination.seam.fails["install"] = RuntimeError("no such grammar")
    with pytest.raises(CannotMove, match="no such grammar"):
        await destination.incoming.commit(commit())
    assert destination.owned == {}
    assert destination.seam.reserved == []
    assert await destination.incoming.cancel("m1") is True


async def test_a_cancelled_receive_gives_blocks_back_only_when_the_copy_has_ended():
    destination = await reserved()
    copy = destination.links.copy = Hold()
    receiving = asyncio.create_task(destination.incoming.receive(stage(0, 2)))
    await copy.reached.wait()
    cancelling = asyncio.create_task(destination.incoming.cancel("m1"))
    await let_others_run()
    assert await cancelling is True
    assert len(destination.seam.reserved) == 1
    copy.release()
    await receiving
    await let_others_run()
    assert destination.seam.reserved == []


async def test_a_source_that_hangs_up_during_a_receive_does_not_stop_the_copy():
    destination = await reserved()
    copy = destination.links.copy = Hold()
    receiving = asyncio.create_task(destination.incoming.receive(stage(0, 2)))
    await copy.reached.wait()
    receiving.cancel()
    await asyncio.gather(receiving, return_exceptions=True)
    destination.now = TIMEOUT_S + 1
    expiring = asyncio.create_task(destination.incoming.expire())
    await let_others_run()
    assert len(destination.seam.reserved) == 1
    copy.release()
    await asyncio.gather(expiring, let_others_run())
    await destination.incoming.expire()
    assert destination.seam.reserved == []


async def test_a_caller_that_gives_up_on_cancel_does_not_stop_the_giving_back():
    destination = await reserved()
    copy = destination.links.copy = Hold()
    receiving = asyncio.create_task(destination.incoming.receive(stage(0, 2)))
    await copy.reached.wait()
    cancelling = asyncio.create_task(destination.incoming.cancel("m1"))
    await let_others_run()
    cancelling.cancel()
    copy.release()
    await asyncio.gather(receiving, cancelling, return_exceptions=True)
    await let_others_run()
    assert destination.seam.reserved == []


async def test_blocks_are_given_back_after_a_receive_that_failed():
    destination = await reserved()
    destination.links.error = ConnectionError("reset")
    with pytest.raises(CannotMove, match="reset"):
        await destination.incoming.receive(stage(0, 2))
    assert await destination.incoming.cancel("m1") is True
    assert destination.seam.reserved == []


async def test_a_grammar_is_compiled_before_the_blocks_are_granted():
    destination = Destination()
    destination.seam.compiling = Future()
    reserving = asyncio.create_task(destination.incoming.reserve(reserve()))
    await let_others_run()
    assert not reserving.done()
    destination.seam.compiling.set_result(None)
    assert isinstance(await reserving, Reserved)


async def test_a_grammar_that_takes_too_long_is_a_refusal():
    destination = Destination(timeout_s=SHORT_S)
    destination.seam.compiling = Future()
    answer = await destination.incoming.reserve(reserve())
    assert isinstance(answer, Refused)
    assert "grammar" in answer.reason
    assert destination.seam.reserved == []


async def test_a_move_given_up_while_its_grammar_compiles_leaves_nothing_reserved():
    destination = Destination()
    destination.seam.compiling = Future()
    reserving = asyncio.create_task(destination.incoming.reserve(reserve()))
    await let_others_run()
    assert await destination.incoming.cancel("m1") is True
    destination.seam.compiling.set_result(None)
    assert isinstance(await reserving, Refused)
    assert destination.seam.reserved == []
    assert len(destination.incoming) == 0


# --- later stages, and messages that come twice ---------------------------------------------------


async def test_a_later_stage_gets_more_blocks():
    destination = await reserved()
    assert await destination.incoming.extend(Extend("m1", 100)) == Reserved(7 * BLOCK, 0)
    assert await destination.incoming.receive(stage(4, 3)) == 3


async def test_no_room_for_a_later_stage_is_refused_and_the_first_ones_blocks_stay_held():
    destination = await reserved()
    destination.seam.refusal = "no room"
    assert await destination.incoming.extend(Extend("m1", 100)) == Refused("no room")
    assert len(destination.seam.reserved) == 1


async def test_every_stage_renews_the_lease():
    destination = await reserved()
    for _ in range(5):
        destination.now += TIMEOUT_S - 1
        await destination.incoming.extend(Extend("m1", 100))
        await destination.incoming.expire()
    assert len(destination.seam.reserved) == 1


async def test_a_doubled_pre_alloc_gets_the_same_answer_and_no_second_reservation():
    destination = Destination()
    held = destination.steps.hold("reserve")
    first = asyncio.create_task(destination.incoming.reserve(reserve()))
    await held.reached.wait()
    second = asyncio.create_task(destination.incoming.reserve(reserve()))
    held.release()
    assert await first == await second == await destination.incoming.reserve(reserve())
    assert len(destination.seam.reserved) == 1


async def test_a_pre_alloc_that_comes_after_the_end_of_its_move_is_refused():
    destination = await reserved()
    await destination.incoming.cancel("m1")
    assert isinstance(await destination.incoming.reserve(reserve()), Refused)
    assert destination.seam.reserved == []


async def test_a_doubled_stage_waits_for_no_bytes_of_its_own():
    destination = await reserved()
    assert await destination.incoming.receive(stage(0, 2)) == 2
    assert await destination.incoming.receive(stage(0, 2)) == 2
    assert destination.links.received == [[0, 1]]


async def test_a_stage_or_pre_alloc_after_the_commit_is_refused():
    destination = await reserved()
    await destination.incoming.commit(commit())
    for late in (
        destination.incoming.receive(stage(0, 2)),
        destination.incoming.extend(Extend("m1", 90)),
    ):
        with pytest.raises(CannotMove):
            await late


async def test_the_commit_brings_the_last_blocks_and_installs_only_when_they_are_in_place():
    destination = await reserved()
    copy = destination.links.copy = Hold()
    last = replace(commit(), last=stage(2, 1))
    committing = asyncio.create_task(destination.incoming.commit(last))
    await copy.reached.wait()
    assert destination.seam.running == set()
    copy.release()
    await committing
    assert destination.links.received == [[2]]
    assert destination.seam.running == {"r1"}


async def test_a_commit_whose_last_blocks_do_not_come_does_not_happen():
    destination = await reserved()
    destination.links.error = ConnectionError("reset")
    with pytest.raises(CannotMove, match="reset"):
        await destination.incoming.commit(replace(commit(), last=stage(2, 1)))
    assert destination.owned == {}
    assert destination.seam.reserved == []
    assert await destination.incoming.cancel("m1") is True


async def test_a_cancel_while_the_last_blocks_come_prevents_the_commit():
    destination = await reserved()
    copy = destination.links.copy = Hold()
    committing = asyncio.create_task(
        destination.incoming.commit(replace(commit(), last=stage(2, 1)))
    )
    await copy.reached.wait()
    cancelling = asyncio.create_task(destination.incoming.cancel("m1"))
    await let_others_run()
    copy.release()
    assert await cancelling is True
    with pytest.raises(CannotMove):
        await committing
    assert destination.seam.running == set()
    assert destination.seam.reserved == []


async def test_one_source_has_one_move_at_a_time_to_the_same_destination():
    destination = await reserved()
    second = replace(reserve("m2", "r2"), source="source of m1")
    assert isinstance(await destination.incoming.reserve(second), Refused)
