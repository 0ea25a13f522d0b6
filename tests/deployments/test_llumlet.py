"""The llumlet: it owns requests, answers open calls, measures load, and hands requests over."""

import asyncio
import math
from concurrent.futures import Future
from dataclasses import replace

import pytest

from deployments.departures import BACKOFF_S, REFUSED_S
from deployments.engine_loop import EngineDead
from deployments.llumlet import GRAMMAR_S
from deployments.messages import Orders
from deployments.policy.pairing import Target
from migration.engine_seam import SLACK_TOKENS
from migration.ownership import Outcome
from migration.protocol.messages import Refused, Reserve, Reserved
from migration.snapshot import CannotMove, Snapshot, UnknownRequest
from tests.deployments.fakes import ORPHAN_S, Instance, let_others_run, submission
from tests.virtual import virtually

# --- open calls ---------------------------------------------------------------------------------


async def test_a_submitted_request_runs_and_its_call_stays_open():
    here = Instance()
    call = await here.submitted()
    assert not call.done()
    assert set(here.llumlet.owned) == {"r1"}


async def test_a_finished_request_answers_its_call_and_is_forgotten():
    here = Instance()
    call = await here.submitted()
    here.llumlet.finished(["r1", "of nobody"])
    assert await call == Outcome("finished")
    assert here.llumlet.owned == {}


async def test_a_request_that_the_engine_does_not_take_fails_its_call_and_is_forgotten():
    here = Instance()
    here.steps.error = EngineDead("CUDA error")
    with pytest.raises(EngineDead):
        await here.llumlet.submit(submission())
    assert here.llumlet.owned == {}


async def test_a_cancelled_call_aborts_its_request():
    here = Instance()
    call = await here.submitted()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert here.engine.known == {}
    assert here.llumlet.owned == {}


@pytest.mark.parametrize("begun", [False, True])
async def test_a_call_cancelled_before_the_engine_has_its_request_leaves_nothing(begun):
    here = Instance()
    here.steps.busy = True
    call = asyncio.create_task(here.llumlet.submit(submission()))
    await let_others_run()
    if begun:
        here.engine.give("r1")  # the command runs while its caller goes away
    call.cancel()
    await let_others_run()
    here.steps.go_on()
    await asyncio.gather(call, return_exceptions=True)
    await let_others_run()
    assert here.engine.known == {}
    assert here.llumlet.owned == {}


async def test_an_aborted_request_answers_its_call():
    here = Instance()
    call = await here.submitted()
    await here.llumlet.abort("r1")
    assert await call == Outcome("aborted")
    assert here.engine.known == here.llumlet.owned == {}


async def test_to_abort_what_is_not_here_does_nothing():
    await Instance().llumlet.abort("r1")


async def test_an_abort_while_the_request_is_handed_over_is_left_to_the_move():
    here = Instance()
    call = await here.submitted()
    owned = here.llumlet.owned["r1"]
    owned.committing = True
    await here.llumlet.abort("r1")
    assert owned.aborted
    assert "r1" in here.engine.known
    assert not call.done()
    call.cancel()


async def test_a_request_that_moved_here_is_attached_to():
    here = Instance()
    here.llumlet.own(submission())
    call = asyncio.create_task(here.llumlet.attach("r1"))
    await let_others_run()
    here.llumlet.finished(["r1"])
    assert await call == Outcome("finished")
    assert here.llumlet.owned == {}


async def test_a_request_that_finished_before_anyone_attached_still_says_so():
    here = Instance()
    here.llumlet.own(submission())
    here.llumlet.finished(["r1"])
    assert await here.llumlet.attach("r1") == Outcome("finished")
    assert here.llumlet.owned == {}


async def test_to_attach_to_what_is_not_here_says_so():
    assert await Instance().llumlet.attach("r1") == Outcome("unknown")


async def test_a_request_that_was_not_taken_in_after_all_is_unknown():
    here = Instance()
    owned = here.llumlet.own(submission())
    call = asyncio.create_task(here.llumlet.attach("r1"))
    await let_others_run()
    here.llumlet.disown(owned)
    assert await call == Outcome("unknown")
    assert here.llumlet.owned == {}


async def test_a_dead_engine_fails_every_open_call():
    here = Instance()
    calls = [await here.submitted("r1"), await here.submitted("r2")]
    here.llumlet.fail_all(RuntimeError("CUDA error"))
    for call in calls:
        with pytest.raises(EngineDead, match="CUDA error"):
            await call


async def test_of_two_calls_to_move_a_request_at_once_one_is_made():
    here = Instance()
    call = await here.submitted()
    moves = [here.llumlet.migrate_out("r1", there, "admin") for there in ("there", "elsewhere")]
    _, second = await asyncio.gather(*moves, return_exceptions=True)
    assert isinstance(second, CannotMove)
    assert len(here.outgoing.moves) == 1
    await call


async def test_an_ingress_that_comes_late_hears_where_the_request_went():
    """It moved on before the ingress could attach."""
    here = Instance()
    here.llumlet.own(submission())
    here.engine.give("r1")
    await here.llumlet.migrate_out("r1", "there", "drain")
    assert await here.llumlet.attach("r1") == Outcome("moved", "there")
    assert here.llumlet.owned == {}


# --- requests that were lost elsewhere ----------------------------------------------------------


async def test_a_request_that_was_lost_elsewhere_goes_on_from_its_tokens():
    here = Instance()
    call = await here.submitted(tokens=[11, 12])
    assert here.engine.continued == {"r1": (11, 12)}
    assert not call.done()
    here.llumlet.finished(["r1"])
    assert await call == Outcome("finished")


async def test_a_request_that_was_lost_before_its_first_token_begins_anew():
    here = Instance()
    await here.submitted(tokens=[])
    assert here.engine.continued == {}


@pytest.mark.parametrize("method", ["revive", "install"])
async def test_a_request_that_cannot_go_on_from_its_tokens_is_refused_and_forgotten(
    method, monkeypatch
):
    def refuse(*_):
        raise CannotMove("it has images")

    here = Instance()
    monkeypatch.setattr(here.engine, method, refuse)
    refused = Outcome("refused", detail="it has images")
    assert await here.llumlet.submit(submission(), [11]) == refused
    assert here.engine.known == here.llumlet.owned == {}


@pytest.fixture
async def compiling():
    """An instance where a request waits for its grammar, and its open call."""
    here = Instance()
    here.engine.compiling = Future()
    call = asyncio.create_task(here.llumlet.submit(submission(), [11]))
    await let_others_run()
    assert here.engine.known == {}
    return here, call


async def test_a_request_goes_on_once_its_grammar_is_compiled(compiling):
    here, call = compiling
    here.engine.compiling.set_result(None)
    await let_others_run()
    assert here.engine.continued == {"r1": (11,)}
    call.cancel()


async def test_a_call_that_is_cancelled_while_the_grammar_is_compiled_leaves_nothing(compiling):
    here, call = compiling
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    here.engine.compiling.set_result(None)
    await let_others_run()
    assert here.engine.known == here.llumlet.owned == {}


async def test_an_abort_while_the_grammar_is_compiled_leaves_nothing(compiling):
    here, call = compiling
    await here.llumlet.abort("r1")
    here.engine.compiling.set_result(None)
    await let_others_run()
    assert await call == Outcome("aborted")
    assert here.engine.known == here.llumlet.owned == {}


@virtually
async def test_a_grammar_that_takes_too_long_is_not_waited_for():
    here = Instance()
    here.engine.compiling = Future()
    async with asyncio.timeout(GRAMMAR_S + 0.1):
        outcome = await here.llumlet.submit(submission(), [11])
    assert outcome == Outcome("refused", detail="its grammar is still being compiled")
    assert here.llumlet.owned == {}


# --- orphans ------------------------------------------------------------------------------------


async def test_a_request_that_no_ingress_asks_for_is_dropped():
    here = Instance()
    here.llumlet.own(submission())
    here.engine.give("r1")
    here.now += ORPHAN_S
    await here.llumlet.housekeeping()
    assert "r1" in here.engine.known
    here.now += 1
    await here.llumlet.housekeeping()
    assert here.engine.known == here.llumlet.owned == {}


async def test_an_unclaimed_outcome_is_dropped():
    here = Instance()
    here.llumlet.own(submission())
    here.llumlet.finished(["r1"])
    here.now += ORPHAN_S + 1
    await here.llumlet.housekeeping()
    assert here.llumlet.owned == {}


async def test_a_request_with_an_open_call_is_never_an_orphan():
    here = Instance()
    call = await here.submitted()
    here.now += 100 * ORPHAN_S
    await here.llumlet.housekeeping()
    assert "r1" in here.engine.known
    call.cancel()


async def test_housekeeping_ends_leases():
    here = Instance()
    await here.llumlet.housekeeping()
    assert here.incoming.expired == 1


# --- moving -------------------------------------------------------------------------------------


async def test_a_moved_request_answers_its_call_with_the_new_owner_and_is_forgotten():
    here = Instance()
    call = await here.submitted()
    record = await here.llumlet.migrate_out("r1", "there", "admin")
    assert record.outcome == "completed"
    assert await call == Outcome("moved", "there")
    assert here.llumlet.owned == {}
    assert here.records == [record]
    assert here.llumlet.migrations == {"completed": 1}


async def test_a_request_is_found_by_its_public_id_too():
    here = Instance()
    await here.submitted()
    await here.llumlet.migrate_out("public-r1", "there", "admin")
    assert here.outgoing.moves == [("r1", "there", "admin")]


async def test_a_move_that_failed_leaves_the_call_open():
    here = Instance()
    call = await here.submitted()
    here.outgoing.outcome = "aborted"
    await here.llumlet.migrate_out("r1", "there", "admin")
    assert not call.done()
    assert set(here.llumlet.owned) == {"r1"}
    assert here.llumlet.migrations == {"aborted": 1}
    call.cancel()


async def test_what_does_not_run_here_cannot_be_moved():
    here = Instance()
    with pytest.raises(UnknownRequest):
        await here.llumlet.migrate_out("r1", "there", "admin")


async def test_a_request_is_not_moved_to_where_it_is():
    here = Instance()
    await here.submitted()
    with pytest.raises(CannotMove, match="already"):
        await here.llumlet.migrate_out("r1", "here", "admin")


async def test_a_request_moves_once_at_a_time():
    here = Instance()
    await here.submitted()
    here.outgoing.may_end.clear()
    first = asyncio.create_task(here.llumlet.migrate_out("r1", "there", "admin"))
    await here.outgoing.begun.wait()
    with pytest.raises(CannotMove, match="on the move"):
        await here.llumlet.migrate_out("r1", "elsewhere", "admin")
    here.outgoing.may_end.set()
    await first


async def test_no_more_requests_move_at_once_than_allowed():
    here = Instance(max_concurrent=1)
    await here.submitted("r1")
    await here.submitted("r2")
    here.outgoing.may_end.clear()
    first = asyncio.create_task(here.llumlet.migrate_out("r1", "there", "admin"))
    await here.outgoing.begun.wait()
    with pytest.raises(CannotMove, match="on the move"):
        await here.llumlet.migrate_out("r2", "there", "admin")
    here.outgoing.may_end.set()
    await first


async def test_a_caller_that_hangs_up_does_not_stop_the_move_nor_lose_its_record():
    here = Instance()
    call = await here.submitted()
    here.outgoing.may_end.clear()
    order = asyncio.create_task(here.llumlet.migrate_out("r1", "there", "admin"))
    await here.outgoing.begun.wait()
    order.cancel()
    here.outgoing.may_end.set()
    assert await call == Outcome("moved", "there")
    await let_others_run()
    assert [record.outcome for record in here.records] == ["completed"]
    assert here.llumlet.migrations == {"completed": 1}
    assert here.llumlet.owned == {}


# --- orders -------------------------------------------------------------------------------------


THERE, ELSEWHERE = Target("there", 1000), Target("elsewhere", 1000)


async def obeyed(here: Instance, room: float = 1000) -> list[str]:
    """Which requests left on one order."""
    await here.llumlet.obey(Orders((replace(THERE, room=room),)), "balance")
    return [request_id for request_id, *_ in here.outgoing.moves]


async def test_without_orders_nothing_moves():
    here = Instance()
    await here.submitted()
    assert await here.llumlet.obey(Orders(), "balance") is None
    assert here.outgoing.moves == []


async def test_an_order_moves_one_request_the_least_urgent_and_shortest():
    here = Instance()
    for name in ("urgent", "long", "short"):
        await here.submitted(name)
    here.engine.give("urgent", priority=-10, num_tokens=1)
    here.engine.give("long", num_tokens=900)
    assert await obeyed(here) == ["short"]


async def test_a_request_that_has_not_begun_is_preferred():
    here = Instance()
    for name in ("runs", "waits"):
        await here.submitted(name)
    here.engine.give("waits", num_computed_tokens=0, num_tokens=900)
    here.engine.queue = ["waits"]
    assert await obeyed(here) == ["waits"]


async def test_of_those_that_wait_the_head_of_line_leaves_first_however_little_is_left_of_it():
    here = Instance()
    for name in ("behind", "head"):
        await here.submitted(name)
        here.engine.give(name, num_computed_tokens=0, num_output_tokens=0)
    here.engine.give("head", num_computed_tokens=0, num_tokens=900, max_tokens=1)
    here.engine.queue = ["head", "behind"]
    assert await obeyed(here) == ["head"]


@pytest.mark.parametrize("queue", [[], ["r1"]], ids=["runs", "waits"])
async def test_what_does_not_fit_into_the_destination_s_room_stays(queue):
    here = Instance()
    await here.submitted()
    # 20 blocks, with what it grows meanwhile
    here.engine.give("r1", num_tokens=320 - SLACK_TOKENS, num_computed_tokens=0 if queue else 250)
    here.engine.queue = queue
    assert await obeyed(here, room=19) == []
    assert await obeyed(here, room=20) == ["r1"]


async def test_the_running_request_leaves_that_makes_room_for_the_head_of_line():
    here = Instance()
    for name in ("short", "long", "waits"):
        await here.submitted(name)
    here.engine.give("long", num_tokens=800)
    here.engine.give("waits", num_computed_tokens=0, num_tokens=960)
    here.engine.queue, here.engine.fixed = ["waits"], {"waits"}
    here.engine.blocks_free = 20
    assert await obeyed(here) == ["long"]


async def test_what_cannot_be_moved_is_passed_over():
    here = Instance()
    for name in ("fixed", "free"):
        await here.submitted(name)
    here.engine.fixed = {"fixed"}
    here.engine.give("free", num_tokens=900)
    assert await obeyed(here) == ["free"]


async def test_a_request_near_its_end_stays_unless_the_instance_drains():
    here = Instance()
    await here.submitted()
    here.engine.give("r1", max_tokens=100, num_output_tokens=95)
    assert await obeyed(here) == []
    here.llumlet.drain(True)
    assert await obeyed(here) == ["r1"]


async def test_after_a_failed_move_orders_to_go_there_wait():
    here = Instance()
    await here.submitted()
    here.outgoing.outcome = "refused"
    assert await obeyed(here) == ["r1"]
    assert await obeyed(here) == ["r1"]
    here.now += BACKOFF_S
    assert await obeyed(here) == ["r1", "r1"]


async def test_a_destination_that_failed_is_left_out_for_the_next():
    here = Instance()
    await here.submitted()
    here.outgoing.outcome = "refused"
    for _ in range(3):
        await here.llumlet.obey(Orders((THERE, ELSEWHERE)), "drain")
    assert [to for _, to, _ in here.outgoing.moves] == ["there", "elsewhere"]


async def test_where_nothing_fits_into_the_first_destination_the_next_is_taken():
    here = Instance()
    await here.submitted()
    await here.llumlet.obey(Orders((replace(THERE, room=0), ELSEWHERE)), "drain")
    assert [to for _, to, _ in here.outgoing.moves] == ["elsewhere"]


async def test_a_drain_that_was_refused_tries_again_with_the_next_orders():
    here = Instance()
    await here.submitted()
    here.llumlet.drain(True)
    here.outgoing.outcome = "refused"
    assert await obeyed(here) == ["r1"]
    assert await obeyed(here) == ["r1"]
    here.now += REFUSED_S
    assert await obeyed(here) == ["r1", "r1"]


async def test_a_drain_that_begins_while_a_move_is_refused_tries_again_as_soon():
    here = Instance()
    await here.submitted()
    here.outgoing.outcome = "refused"
    here.outgoing.may_end.clear()
    order = asyncio.create_task(here.llumlet.obey(Orders((THERE,)), "balance"))
    await here.outgoing.begun.wait()
    here.llumlet.drain(True)
    here.outgoing.may_end.set()
    await order
    here.now += REFUSED_S
    assert await obeyed(here) == ["r1", "r1"]


async def test_what_waits_goes_only_where_it_would_come_first():
    here = Instance()
    await here.submitted("waits")
    here.engine.queue = ["waits"]
    here.engine.give("waits", num_computed_tokens=0, arrival_time=30.0)
    await here.llumlet.obey(Orders((replace(THERE, before=(0, 20.0)),)), "balance")
    assert here.outgoing.moves == []
    await here.llumlet.obey(Orders((replace(THERE, before=(0, 40.0)),)), "balance")
    assert [request_id for request_id, *_ in here.outgoing.moves] == ["waits"]


async def test_a_request_that_ends_while_it_is_moved_does_not_count_against_the_destination():
    here = Instance()
    for name in ("ends", "stays"):
        await here.submitted(name)
    here.engine.give("stays", num_tokens=900)
    here.outgoing.outcome = "aborted"
    here.outgoing.may_end.clear()
    order = asyncio.create_task(here.llumlet.obey(Orders((THERE,)), "drain"))
    await here.outgoing.begun.wait()
    here.llumlet.finished(["ends"])
    here.engine.drop("ends")
    here.outgoing.may_end.set()
    await order
    assert await obeyed(here) == ["ends", "stays"]


async def test_orders_obeyed_at_once_move_different_requests_to_different_destinations():
    here = Instance()
    for name in ("r1", "r2", "r3"):
        await here.submitted(name)
    here.outgoing.may_end.clear()
    here.steps.busy = True  # all are there before the first has chosen
    orders = Orders((THERE, ELSEWHERE))
    obeying = asyncio.gather(*(here.llumlet.obey(orders, "drain") for _ in range(3)))
    await let_others_run()
    here.steps.go_on()
    await let_others_run()
    assert here.outgoing.moves == [("r1", "there", "drain"), ("r2", "elsewhere", "drain")]
    here.outgoing.may_end.set()
    await obeying


async def test_after_a_move_the_next_order_is_followed_at_once():
    here = Instance()
    for name in ("r1", "r2"):
        await here.submitted(name)
    await obeyed(here)
    assert await obeyed(here) == ["r1", "r2"]


# --- load ---------------------------------------------------------------------------------------


async def test_an_idle_instance_is_as_free_as_it_has_blocks():
    load = await Instance().llumlet.load()
    assert (load.replica_id, load.state, load.freeness) == ("here", "running", 100)
    assert (load.blocks_total, load.blocks_used, load.block_size) == (100, 0, 16)
    assert (load.migrating_in, load.migrating_out) == (1, 0)


async def test_the_load_counts_requests_blocks_headroom_and_the_head_of_line():
    here = Instance()
    await here.submitted("runs", priority_class="high")
    await here.submitted("waits")
    await here.submitted("waits behind")
    here.engine.give("waits", num_computed_tokens=0, arrival_time=1.0)
    here.engine.queue = ["waits", "waits behind"]
    here.engine.blocks_free = 60
    load = await here.llumlet.load()
    assert (load.running, load.waiting) == (1, 2)
    assert (load.head_of_line_blocks, load.head_of_line_since) == (2, 1.0)
    here.engine.give("waits", priority=-10)
    assert (await here.llumlet.load()).head_of_line_priority == -10
    assert load.freeness == (100 - 40 - 160 / 16 - 2) / 2


async def test_one_that_moved_here_and_waits_for_its_next_step_lacks_nothing():
    here = Instance()
    await here.submitted("moved here")
    here.engine.queue, here.engine.blocks_free = ["moved here"], 98
    load = await here.llumlet.load()
    assert (load.waiting, load.head_of_line_blocks, load.freeness) == (1, 0, 98)


async def test_an_urgent_request_that_waits_has_its_headroom_before_it_runs():
    here = Instance()
    await here.submitted("runs")
    await here.submitted("waits", priority_class="high")
    here.engine.give("waits", num_tokens=330, num_computed_tokens=0)
    here.engine.queue = ["waits"]
    load = await here.llumlet.load()
    assert (load.headroom_blocks, load.staying) == ({"high": 10}, 1)
    assert load.freeness == (100 - 10 - 21) / 2


async def test_blocks_for_prompts_that_are_not_computed_yet_are_due():
    here = Instance()
    await here.submitted("decodes")
    here.engine.give("prefills", num_tokens=100, num_computed_tokens=40)
    here.engine.give("waits", num_tokens=33, num_computed_tokens=0)
    assert (await here.llumlet.load()).due_blocks == (7 - 3) + 3


async def test_urgent_requests_stay_and_others_make_way():
    here = Instance()
    await here.submitted("urgent", priority_class="high")
    assert await obeyed(here) == []
    await here.submitted("normal")
    assert await obeyed(here) == ["normal"]


async def test_urgent_requests_leave_an_instance_that_drains_or_lacks_blocks():
    for state in ("drains", "lacks blocks"):
        here = Instance()
        await here.submitted("urgent", priority_class="high")
        here.llumlet.drain(state == "drains")
        here.engine.blocks_free = 0 if state == "lacks blocks" else 100
        assert await obeyed(here) == ["urgent"]


async def test_a_draining_instance_says_so_until_it_is_taken_back():
    here = Instance()
    here.llumlet.drain(True)
    load = await here.llumlet.load()
    assert (load.state, load.freeness) == ("draining", -math.inf)
    here.llumlet.drain(False)
    assert (await here.llumlet.load()).state == "running"


async def test_a_draining_instance_takes_no_request_from_others():
    here = Instance()
    offer = Reserve("m1", "there", Snapshot(submission()), tokens=40)
    assert await here.llumlet.reserve(offer) == Reserved(capacity=40, cached_blocks=0)
    here.llumlet.drain(True)
    assert await here.llumlet.reserve(offer) == Refused("it is draining")


async def test_an_instance_that_serve_stops_drains_for_good():
    here = Instance()
    here.llumlet.retire()
    with pytest.raises(CannotMove, match="Serve stops here"):
        here.llumlet.drain(False)
    assert (await here.llumlet.load()).state == "draining"


async def test_a_drain_says_once_how_long_it_took_and_what_left(caplog):
    caplog.set_level("INFO")
    here = Instance()
    call = await here.submitted()
    here.llumlet.drain(True)
    here.now += 2
    await here.llumlet.migrate_out("r1", "there", "drain")
    await call
    here.now += 5
    await here.submitted("came late")
    here.llumlet.finished(["came late"])
    told = [each.getMessage() for each in caplog.records if "drained" in each.getMessage()]
    assert told == ["here: drained in 2.00 s, 1 requests moved with 3 KV blocks"]


async def test_a_request_of_another_model_is_refused():
    here = Instance()
    offer = Reserve("m1", "there", Snapshot(submission(fingerprint="13b")), tokens=40)
    refused = await here.llumlet.reserve(offer)
    assert refused == Refused("it runs another model or engine configuration")
    assert (await here.llumlet.load()).fingerprint == "tiny"


async def test_an_arrival_is_reported_once():
    here = Instance()
    await here.submitted("r1")
    await here.submitted("r2")
    assert (await here.llumlet.report()).arrived == ("r1", "r2")
    assert (await here.llumlet.report()).arrived == ()


async def test_a_move_under_way_is_reported():
    here = Instance()
    await here.submitted()
    here.outgoing.may_end.clear()
    move = asyncio.create_task(here.llumlet.migrate_out("r1", "there", "admin"))
    await here.outgoing.begun.wait()
    assert (await here.llumlet.load()).migrating_out == 1
    here.outgoing.may_end.set()
    await move
    report = await here.llumlet.report()
    assert report.load.migrating_out == 0
    assert report.migrations == {"completed": 1}


@pytest.mark.parametrize("event", ["own", "finish", "drain", "abort"])
async def test_what_changes_the_load_is_told(event):
    here = Instance()
    await here.submitted("r0")
    here.llumlet.changed.clear()
    if event == "own":
        here.llumlet.own(submission())
    elif event == "finish":
        here.llumlet.finished(["r0"])
    elif event == "drain":
        here.llumlet.drain(True)
    else:
        await here.llumlet.abort("r0")
    assert here.llumlet.changed.is_set()
