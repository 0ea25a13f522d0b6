"""A request whose instance is lost goes on elsewhere, with the tokens that the journal has."""

import asyncio

import pytest
from ray.exceptions import ActorDiedError
from vllm.v1.engine import FinishReason

from app.keeper import GAP_S, LONGEST_PAUSE_S, PLACE_S, RETRY_PAUSE_S
from app.refusals import Answer
from app.watch import WATCH_S
from deployments.consult import NoInstance
from deployments.engine_loop import EngineDead
from deployments.messages import Route
from deployments.pinned import ReplicaGone
from migration.ownership import Outcome
from tests.app.ingress import Ingress, at_once
from tests.virtual import virtually

SOON_S = 2 * WATCH_S
"""By then the ingress has looked after its requests."""


async def die(ingress: Ingress, replica_id: str = "a") -> None:
    ingress.replicas.die(replica_id)
    await at_once()


def died(replica_id: str = "a") -> str:
    """What is said of that."""
    return f"its instance {replica_id} was lost (ActorDiedError)"


def failure(answer: Answer) -> str:
    """What the client is told."""
    assert answer.refusal is not None
    assert answer.refusal.status == 503
    return answer.refusal.message


# --- going on -----------------------------------------------------------------------------------


@virtually
async def test_a_request_whose_replica_dies_goes_on_elsewhere_from_its_last_token(start):
    ingress = start()
    await ingress.begin(10, 11)

    await die(ingress)
    assert ingress.replicas.tokens == {"r1": [], "r1~2": [10, 11]}
    assert ingress.replicas.routes["r1~2"] == Route(avoid=frozenset("a"), chosen="b")
    ingress.replicas.own("r1~2")
    ingress.replicas.send("r1~2", 2, [12, 13], last=True)
    await at_once()

    assert ingress.tokens == {"r1": [10, 11, 12, 13]}
    assert ingress.ends == {"r1": FinishReason.LENGTH}
    shown = ingress.shown()
    assert (shown["state"], shown["replicas"], shown["recoveries"]) == ("finished", ["a", "b"], 1)
    assert ingress.client.recoveries == 1
    assert ingress.client.journal.live() == []


@virtually
async def test_it_is_the_same_request_under_another_id(start):
    ingress = start()
    await ingress.begin(10)
    await die(ingress)
    first, second = ingress.replicas.submitted.values()
    assert (first.request, first.public_id) == (second.request, second.public_id)
    assert ingress.replicas.aborted == [], "nobody is there to be told"


@virtually
async def test_it_may_be_lost_again_and_again(start):
    ingress = start(replicas="abcd")
    await ingress.begin(10)
    for number, replica_id in enumerate("abc", start=1):
        await die(ingress, replica_id)
        await ingress.go_on(f"r1~{number + 1}", 10 + number)
    assert ingress.tokens == {"r1": [10, 11, 12, 13]}
    assert ingress.shown()["replicas"] == ["a", "b", "c", "d"]
    assert ingress.shown()["recoveries"] == ingress.client.recoveries == 3


@virtually
async def test_its_pause_lasts_from_the_loss_to_the_next_token_however_often_it_is_lost(start):
    ingress = start(replicas="abc")
    await ingress.begin(10)
    await asyncio.sleep(7)
    for name, replica_id in (("r1~2", "a"), ("r1~3", "b")):
        await die(ingress, replica_id)
        await asyncio.sleep(1)
        await ingress.go_on(name)
    await asyncio.sleep(1)
    assert ingress.shown()["recovered_ms"] == 0
    for first in (1, 2):
        ingress.replicas.send("r1~3", first, [10 + first])
        await asyncio.sleep(5)
    assert ingress.shown()["recovered_ms"] == pytest.approx(3000, abs=10)


@virtually
async def test_a_request_that_got_its_last_token_in_time_is_not_lost_with_its_replica(start):
    ingress = start()
    await ingress.begin(10)
    ingress.replicas.fail("r1", ActorDiedError())
    ingress.replicas.send("r1", 1, [11], last=True)
    await at_once()
    assert ingress.ends == {"r1": FinishReason.LENGTH}
    assert list(ingress.replicas.submitted) == ["r1"]
    assert ingress.client.journal.get("r1~2") is None


@virtually
async def test_a_recovery_is_told_in_one_line(start, caplog):
    caplog.set_level("INFO", "ray.serve.llumnix")
    ingress = start()
    await ingress.begin(10, 11)
    await die(ingress)
    await asyncio.sleep(1)
    await ingress.go_on("r1~2", 12)
    assert caplog.messages == [
        f"request r1 goes on at b from token 2 on, 1.00 s after {died()} (1 of 3)"
    ]


@virtually
@pytest.mark.parametrize(
    "error", [ActorDiedError(), ReplicaGone("replica a is not there"), EngineDead("CUDA error")]
)
async def test_a_replica_that_is_lost_is_avoided_by_later_requests(start, error):
    ingress = start()
    await ingress.begin()
    ingress.replicas.fail("r1", error)
    await at_once()
    await ingress.begin(name="r2")
    assert {ingress.replicas.routes[name].chosen for name in ("r1~2", "r2")} == {"b"}
    assert ingress.replicas.aborted == []


@virtually
@pytest.mark.parametrize("end", [ConnectionError(), Outcome("unknown"), Outcome("aborted")])
async def test_a_replica_that_lost_one_request_is_told_to_abort_it_and_may_have_it_again(
    start, end
):
    ingress = start()
    await ingress.begin(10)
    if isinstance(end, Outcome):
        ingress.replicas.leave("r1", end)
    else:
        ingress.replicas.fail("r1", end)
    await at_once()
    assert ingress.replicas.aborted == [("a", "r1")]
    assert ingress.replicas.routes["r1~2"] == Route(chosen="a")
    await ingress.go_on("r1~2", 11)
    assert ingress.tokens == {"r1": [10, 11]}
    assert (ingress.shown()["replicas"], ingress.shown()["recoveries"]) == (["a"], 1)


@virtually
async def test_siblings_go_on_each_by_itself(start):
    ingress = start()
    answer = Answer()
    for number in range(3):
        await ingress.begin(10 + number, name=f"{number}_r1", answer=answer)
    ingress.replicas.leave("1_r1", Outcome("unknown"))
    await at_once()
    assert list(ingress.replicas.submitted)[3:] == ["1_r1~2"]
    await ingress.go_on("1_r1~2")
    await die(ingress)
    sent_again = {"0_r1~2": [10], "1_r1~3": [11], "2_r1~2": [12]}
    assert sent_again.items() <= ingress.replicas.tokens.items()
    for name, (token,) in sent_again.items():
        await ingress.go_on(name, token + 10)
    assert ingress.tokens == {"0_r1": [10, 20], "1_r1": [11, 21], "2_r1": [12, 22]}
    assert [ingress.shown(name)["recoveries"] for name in ingress.tokens] == [1, 2, 1]


# --- one owner ----------------------------------------------------------------------------------


@virtually
async def test_what_a_former_owner_still_says_is_not_heard(start):
    ingress = start()
    await ingress.begin(10)
    ingress.replicas.leave("r1", Outcome("unknown"))
    await at_once()
    ingress.replicas.send("r1", 1, [99], replica_id="a")
    await ingress.go_on("r1~2", 11)
    ingress.replicas.send("r1", 2, [99], replica_id="a")
    await at_once()
    assert ingress.tokens == {"r1": [10, 11]}


@virtually
async def test_who_says_that_it_has_what_is_elsewhere_or_over_is_told_to_abort_it(start):
    """A move that the lost replica had begun came to its end."""
    ingress = start(replicas="abc")
    await ingress.begin(10)
    await die(ingress)
    ingress.replicas.own("r1", "c")
    ingress.replicas.own("r7", "c")
    await at_once()
    assert ingress.replicas.aborted == [("c", "r1"), ("c", "r7")]
    assert ingress.shown()["recoveries"] == 0
    await ingress.go_on("r1~2")
    assert ingress.shown()["replicas"] == ["a", "b"]


@virtually
async def test_who_speaks_of_what_another_one_has_is_not_heard_and_told_once_to_abort_it(start):
    """COMMIT's answer was lost: both had it for a while."""
    ingress = start(replicas="abc")
    await ingress.begin(10)
    for first in (1, 2):
        ingress.replicas.send("r1", first, [99], replica_id="b")
    ingress.replicas.send("r1", 1, [11])
    ingress.replicas.own("r1", "c", first=1)
    await at_once()
    assert ingress.replicas.aborted == [("b", "r1"), ("c", "r1")]
    assert ingress.tokens == {"r1": [10, 11]}
    assert ingress.shown()["replicas"] == ["a"]


@virtually
async def test_tokens_of_the_former_owner_and_the_new_one_are_put_in_order(start):
    ingress = start()
    await ingress.begin(10)
    ingress.replicas.own("r1", "b", first=3)
    ingress.replicas.send("r1", 3, [13], replica_id="b")
    ingress.replicas.send("r1", 1, [11, 12], replica_id="a")
    await at_once()
    assert ingress.tokens == {"r1": [10, 11, 12, 13]}
    assert ingress.replicas.aborted == []


@virtually
async def test_a_replica_whose_word_that_it_has_a_request_got_lost_is_replaced(start):
    ingress = start()
    await ingress.add()
    await at_once()
    ingress.replicas.send("r1", 0, [10])
    await asyncio.sleep(2 * RETRY_PAUSE_S)
    assert ("a", "r1") in ingress.replicas.aborted
    await ingress.go_on("r1~2", 10)
    assert ingress.tokens == {"r1": [10]}
    assert ingress.shown()["recoveries"] == 0


@virtually
async def test_a_source_that_dies_after_the_commit_has_handed_its_request_over(start):
    ingress = start()
    await ingress.begin(10)
    ingress.replicas.own("r1", "b", first=1)
    await at_once()
    await die(ingress)
    assert ingress.replicas.attached == [("b", "r1")]
    ingress.replicas.send("r1", 1, [11], last=True)
    await at_once()
    assert ingress.tokens == {"r1": [10, 11]}
    assert (ingress.shown()["replicas"], ingress.shown()["recoveries"]) == (["a", "b"], 0)
    assert list(ingress.replicas.submitted) == ["r1"]


@virtually
async def test_a_request_is_followed_from_owner_to_owner(start):
    ingress = start(replicas="abc")
    await ingress.begin(10)
    for first, destination in enumerate("bc", start=1):
        ingress.replicas.own("r1", destination, first)
        ingress.replicas.leave("r1", Outcome("moved", destination))
        await at_once()
        ingress.replicas.send("r1", first, [10 + first])
    assert ingress.replicas.attached == [("b", "r1"), ("c", "r1")]
    assert ingress.shown()["replicas"] == ["a", "b", "c"]
    await die(ingress, "c")
    assert ingress.replicas.routes["r1~2"] == Route(avoid=frozenset("c"), chosen="a")
    assert ingress.replicas.tokens["r1~2"] == [10, 11, 12]


@virtually
async def test_a_request_that_moved_to_a_replica_that_is_dead_goes_on_from_its_tokens(start):
    ingress = start()
    await ingress.begin(10)
    await die(ingress, "b")
    ingress.replicas.leave("r1", Outcome("moved", "b"))
    await at_once()
    assert ingress.replicas.routes["r1~2"] == Route(avoid=frozenset("b"), chosen="a")


# --- waiting for an owner -----------------------------------------------------------------------


@virtually
async def test_what_no_replica_had_yet_is_sent_out_again_and_that_is_no_recovery(start):
    ingress = start()
    await ingress.add()
    await at_once()
    await die(ingress)
    assert list(ingress.replicas.submitted) == ["r1"], "Serve's routers may know nobody else yet"
    await asyncio.sleep(RETRY_PAUSE_S)
    assert ingress.replicas.routes["r1~2"] == Route(avoid=frozenset("a"), chosen="b")
    await ingress.go_on("r1~2", 10)
    assert ingress.tokens == {"r1": [10]}
    assert ingress.shown()["recoveries"] == ingress.client.recoveries == 0


@virtually
async def test_a_new_request_is_sent_out_again_and_again_but_not_for_ever(start):
    ingress = start()
    ingress.replicas.dead = {"a", "b"}
    answer = await ingress.add()
    await asyncio.sleep(PLACE_S - 0.1)
    assert answer.refusal is None
    assert 30 < len(ingress.replicas.submitted) < 50, "with longer and longer pauses"
    await asyncio.sleep(SOON_S)
    assert failure(answer) == "no instance takes the request: none did for 30 s; try again later"


@virtually
@pytest.mark.parametrize("dead", [False, True])
async def test_a_lost_request_waits_for_an_instance_for_some_time(start, dead):
    ingress = start(wait_s=50)
    answer = await ingress.begin(10)
    await asyncio.sleep(20)
    if dead:
        ingress.replicas.dead.add("b")
    await die(ingress)
    await asyncio.sleep(49)
    assert answer.refusal is None
    await asyncio.sleep(1 + SOON_S + LONGEST_PAUSE_S)
    assert failure(answer) == (
        "the request failed: no instance took it over within 50 s; try again"
    )
    assert ingress.client.journal.live() == []


@virtually
@pytest.mark.parametrize(("settings", "last"), [({}, 12), ({"wait_s": 3600}, 1200)])
async def test_while_no_instance_takes_requests_a_lost_one_waits(start, settings, last):
    ingress = start(**settings)
    await ingress.begin(10)
    await die(ingress)
    for number in range(2, last):
        ingress.replicas.fail(f"r1~{number}", NoInstance("all are draining"))
        await asyncio.sleep(2 * LONGEST_PAUSE_S)
    await ingress.go_on(f"r1~{last}", 11)
    assert ingress.tokens == {"r1": [10, 11]}
    assert ingress.shown()["recoveries"] == 1


# --- giving up ----------------------------------------------------------------------------------


@virtually
@pytest.mark.parametrize("most", [1, 2])
async def test_a_request_survives_so_many_losses_and_no_more(start, most):
    ingress = start(replicas="abcd", max_recoveries=most)
    answer = await ingress.begin(10)
    for number, replica_id in enumerate("abc"[:most], start=2):
        await die(ingress, replica_id)
        await ingress.go_on(f"r1~{number}")
    assert answer.refusal is None
    await die(ingress, "abc"[most])
    often = f"after {most} recoveries (recovery.max_recoveries)"
    assert failure(answer) == f"the request failed: {died('abc'[most])}, {often}; try again"
    assert ingress.shown()["state"] == "failed"
    assert len(ingress.replicas.submitted) == 1 + most


@virtually
async def test_without_recovery_a_request_is_lost_with_its_replica(start):
    ingress = start(max_recoveries=0)
    answer = await ingress.begin(10)
    await die(ingress)
    assert failure(answer) == f"the request failed: {died()}; try again"
    assert list(ingress.replicas.submitted) == ["r1"]


@virtually
async def test_without_recovery_what_no_replica_had_is_sent_out_again_nevertheless(start):
    ingress = start(max_recoveries=0)
    await ingress.add()
    await at_once()
    await die(ingress)
    await asyncio.sleep(RETRY_PAUSE_S)
    await at_once()
    assert list(ingress.replicas.submitted) == ["r1", "r1~2"]


@virtually
async def test_a_source_that_took_the_new_owner_for_dead_and_is_put_right_costs_no_recovery(start):
    ingress = start()
    await ingress.begin(10)
    ingress.replicas.own("r1", "b", first=1)
    ingress.replicas.send("r1", 1, [66], replica_id="a")
    await at_once()
    assert ingress.replicas.aborted == [("a", "r1")]
    assert ingress.replicas.attached == [("b", "r1")]
    ingress.replicas.send("r1", 1, [11])
    await at_once()
    assert (ingress.tokens["r1"], ingress.shown()["recoveries"]) == ([10, 11], 0)


@virtually
async def test_a_request_that_cannot_go_on_from_its_tokens_fails_and_says_why(start):
    ingress = start()
    answer = await ingress.begin(10)
    await die(ingress)
    ingress.replicas.leave("r1~2", Outcome("refused", detail="its grammar is still being compiled"))
    await at_once()
    assert failure(answer) == (
        "the request failed: it cannot go on elsewhere: its grammar is still being compiled;"
        " try again"
    )


@virtually
async def test_what_does_not_fit_into_the_journal_is_served_but_lost_with_its_instance(start):
    ingress = start(max_journal_tokens=20)
    kept = await ingress.begin(10, name="kept")
    long = await ingress.begin(10, name="long")
    grows = [11, 12, 13]
    ingress.replicas.send("long", 1, grows)
    await at_once()
    late = await ingress.begin(20, name="late")
    assert ingress.tokens == {"kept": [10], "long": [10, *grows], "late": [20]}

    await die(ingress)
    await ingress.go_on("kept~2", 11)

    assert kept.refusal is None
    assert ingress.tokens["kept"] == [10, 11]
    no_room = "the journal had no room for it (recovery.max_journal_tokens)"
    assert failure(long) == f"the request failed: {died()}, and {no_room}; try again"
    assert late.refusal is None
    await ingress.go_on("late~2", 21)
    assert ingress.tokens["late"] == [20, 21], "it came when the long one had made room"


@virtually
async def test_what_is_not_in_the_journal_can_be_sent_out_until_a_replica_has_it(start):
    ingress = start(max_journal_tokens=0)
    answer = await ingress.add()
    await at_once()
    await die(ingress)
    await asyncio.sleep(RETRY_PAUSE_S)
    await ingress.go_on("r1~2", 10)
    assert ingress.tokens == {"r1": [10]}
    await die(ingress, "b")
    assert "recovery.max_journal_tokens" in failure(answer)


# --- tokens lost on their way -------------------------------------------------------------------


@virtually
async def test_a_token_that_is_late_is_waited_for(start):
    ingress = start()
    await ingress.begin(10)
    ingress.replicas.send("r1", 2, [12])
    await asyncio.sleep(GAP_S - 0.1)
    ingress.replicas.send("r1", 1, [11])
    await asyncio.sleep(GAP_S)
    assert ingress.tokens == {"r1": [10, 11, 12]}
    assert list(ingress.replicas.submitted) == ["r1"]


@virtually
async def test_a_request_goes_on_from_before_a_token_that_got_lost(start):
    ingress = start()
    await ingress.begin(10)
    ingress.replicas.send("r1", 2, [12])
    await asyncio.sleep(GAP_S + SOON_S)
    assert ingress.replicas.cancelled == {"r1"}
    assert ingress.replicas.aborted == [("a", "r1")]
    assert ingress.replicas.tokens["r1~2"] == [10]
    await ingress.go_on("r1~2", 11, 12)
    assert ingress.tokens == {"r1": [10, 11, 12]}
    assert ingress.shown()["recoveries"] == 1


@virtually
@pytest.mark.parametrize("lost", [False, True])
async def test_a_request_whose_last_token_gets_lost_goes_on_from_the_one_before(start, lost):
    ingress = start()
    await ingress.begin(10)
    ingress.replicas.leave("r1", Outcome("finished"))
    await asyncio.sleep(GAP_S - 0.1)
    if not lost:
        ingress.replicas.send("r1", 1, [11], last=True)
    await asyncio.sleep(0.2)
    assert ("r1~2" in ingress.replicas.submitted) == lost
    assert ("r1" in ingress.ends) != lost


# --- its client leaves --------------------------------------------------------------------------


@virtually
@pytest.mark.parametrize("placed", [False, True])
async def test_a_request_whose_client_leaves_while_it_is_lost_is_not_sent_out_again(start, placed):
    ingress = start()
    await (ingress.begin(10) if placed else ingress.add())
    await at_once()
    await die(ingress)
    await ingress.client.abort_requests_async(["r1"])
    await asyncio.sleep(2 * PLACE_S)
    sent = {"r1", "r1~2"} if placed else {"r1"}
    assert ingress.replicas.submitted.keys() == sent
    assert ingress.replicas.cancelled == sent - {"r1"}
    assert (ingress.shown()["state"], ingress.shown()["recoveries"]) == ("aborted", 0)
    assert ingress.client.journal.live() == []


@virtually
async def test_a_stop_string_that_is_found_late_ends_a_request_that_was_lost_meanwhile(start):
    ingress = start()
    ingress.stop = 11
    ingress.reading.clear()
    await ingress.begin(10, 11)
    await die(ingress)
    ingress.reading.set()
    await at_once()
    assert ingress.replicas.cancelled == {"r1~2"}
    await asyncio.sleep(2 * PLACE_S)
    assert ingress.shown()["state"] == "finished"
    assert list(ingress.replicas.submitted) == ["r1", "r1~2"]


@virtually
async def test_a_mistake_in_the_keeper_ends_the_request_and_is_logged(start, monkeypatch, caplog):
    ingress = start()

    async def fail(entry):
        raise ZeroDivisionError

    monkeypatch.setattr(ingress.client._keeper, "keep", fail)
    answer = await ingress.add("r1")
    await at_once()
    assert answer.refusal is not None
    assert answer.refusal.message == (
        "the request failed: the ingress failed on it (ZeroDivisionError); try again"
    )
    assert "ZeroDivisionError" in caplog.text
    assert ingress.client.journal.live() == []
