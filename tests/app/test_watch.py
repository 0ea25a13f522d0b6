"""An instance that hangs: it is asked how it is, its requests leave, and it may come back."""

import asyncio
import time

import pytest

from app.keeper import PLACE_S
from app.vitals import LATE_S, QUIET_S
from app.watch import WATCH_S
from deployments.engine_loop import EngineDead
from deployments.messages import Route
from migration.ownership import Outcome
from tests.app.ingress import Ingress, at_once
from tests.virtual import virtually

HANG_S = 5.0
SOON_S = 2 * WATCH_S
"""By then the ingress has looked after its requests."""

HUNG = HANG_S + QUIET_S + SOON_S
"""By then what is silent is known to hang."""


async def chosen_for(ingress: Ingress, name: str) -> str | None:
    """Where a new request goes."""
    await ingress.begin(name=name)
    return ingress.replicas.routes[name].chosen


# --- how it is seen -----------------------------------------------------------------------------


@virtually
async def test_a_replica_that_speaks_is_not_asked(start):
    ingress = start()
    await ingress.begin()
    for first in range(20):
        ingress.replicas.send("r1", first, [first])
        await asyncio.sleep(WATCH_S)
    assert ingress.replicas.asked == []


@virtually
async def test_a_replica_that_has_work_and_is_quiet_is_asked_until_it_speaks(start):
    ingress = start()
    await ingress.begin(10)
    await asyncio.sleep(QUIET_S)
    assert ingress.replicas.asked == []
    await asyncio.sleep(10 * QUIET_S)
    assert set(ingress.replicas.asked) == {"a"}
    assert 5 <= len(ingress.replicas.asked) <= 10


@virtually
async def test_a_silent_replica_is_asked_one_question_at_a_time(start):
    ingress = start(hang_s=HANG_S)
    await ingress.begin(10)
    ingress.replicas.hung = {"a"}
    await asyncio.sleep(HANG_S)
    assert ingress.replicas.asked == ["a"]
    await asyncio.sleep(2 * HANG_S)
    assert ingress.replicas.asked.count("a") == 3


@virtually
async def test_a_replica_without_work_is_left_alone(start):
    ingress = start()
    await ingress.begin(10)
    ingress.replicas.send("r1", 1, [11], last=True)
    await asyncio.sleep(10 * QUIET_S)
    assert ingress.replicas.asked == []


@virtually
async def test_a_replica_that_is_found_dead_is_avoided(start):
    ingress = start()
    await ingress.begin(10)
    ingress.replicas.dead = {"a"}  # nobody has told the open call yet
    await asyncio.sleep(QUIET_S + SOON_S)
    assert await chosen_for(ingress, "r2") == "b"


# --- what becomes of its requests ---------------------------------------------------------------


@virtually
@pytest.mark.parametrize("placed", [False, True])
async def test_requests_leave_an_instance_that_hangs(start, placed):
    ingress = start(hang_s=HANG_S)
    await (ingress.begin(10) if placed else ingress.add())
    ingress.replicas.hung = {"a"}
    await asyncio.sleep(HANG_S)
    assert list(ingress.replicas.submitted) == ["r1"]

    await asyncio.sleep(QUIET_S + SOON_S)

    assert ingress.replicas.cancelled == {"r1"}
    assert ingress.replicas.aborted == [("a", "r1")]
    assert ingress.replicas.routes["r1~2"] == Route(avoid=frozenset("a"), chosen="b")
    await ingress.go_on("r1~2", 11)
    assert ingress.tokens == {"r1": [10, 11] if placed else [11]}
    assert ingress.shown()["recoveries"] == placed


@virtually
async def test_an_instance_that_hangs_is_told_of_in_one_line(start, caplog):
    ingress = start(hang_s=HANG_S)
    for name in ("r1", "r2"):
        await ingress.begin(10, name=name)
    ingress.replicas.hung = {"a"}
    await asyncio.sleep(4 * HANG_S)
    assert caplog.messages == ["a hangs: it has said nothing for 5 s"]


@virtually
async def test_new_requests_avoid_an_instance_that_hangs_until_it_speaks(start):
    ingress = start(hang_s=HANG_S)
    await ingress.begin(10)
    ingress.replicas.hung = {"a"}
    await asyncio.sleep(HUNG)
    assert await chosen_for(ingress, "r2") == "b"
    ingress.replicas.send("r1", 1, [11], replica_id="a")
    await at_once()
    assert await chosen_for(ingress, "r3") == "a"


@virtually
async def test_an_instance_that_hung_is_asked_on_although_nothing_of_ours_is_there(start):
    ingress = start(hang_s=HANG_S)
    await ingress.begin(10)
    ingress.replicas.hung = {"a"}
    await asyncio.sleep(HUNG)
    await ingress.go_on("r1~2")
    await asyncio.sleep(10 * HANG_S)
    ingress.replicas.hung.clear()
    await asyncio.sleep(HANG_S + SOON_S)
    assert await chosen_for(ingress, "r2") == "a"


@virtually
@pytest.mark.parametrize(("step_s", "leaves"), [(HANG_S - 1, False), (HANG_S + 2, True)])
async def test_a_long_step_is_no_hang_and_a_longer_one_is(start, step_s, leaves):
    ingress = start(hang_s=HANG_S)
    await ingress.begin(10)
    ingress.replicas.stepping["a"] = time.monotonic()
    await asyncio.sleep(step_s)
    del ingress.replicas.stepping["a"]
    await asyncio.sleep(SOON_S)
    assert ("r1~2" in ingress.replicas.submitted) == leaves
    assert await chosen_for(ingress, "r2") == "a", "its step is over"


@virtually
async def test_requests_that_wait_at_an_instance_that_answers_stay_there(start):
    ingress = start(hang_s=HANG_S)
    await ingress.begin()
    await ingress.add("r2")
    await asyncio.sleep(PLACE_S - 1)
    assert list(ingress.replicas.submitted) == ["r1", "r2"]


@virtually
async def test_who_hangs_again_and_again_is_left_each_time(start):
    ingress = start(hang_s=HANG_S)
    await ingress.begin(10)
    for number, hung in enumerate("aba", start=1):
        ingress.replicas.hung = {hung}
        await asyncio.sleep(2 * HUNG)
        await ingress.go_on(f"r1~{number + 1}", 10 + number)
    assert ingress.shown()["replicas"] == ["a", "b", "a", "b"]
    assert ingress.tokens == {"r1": [10, 11, 12, 13]}


@virtually
async def test_a_request_that_moved_back_to_an_instance_that_hung_may_leave_it_again(start):
    ingress = start(hang_s=HANG_S)
    await ingress.begin(10)
    ingress.replicas.hung = {"a"}
    await asyncio.sleep(HUNG)
    await ingress.go_on("r1~2", 11)
    ingress.replicas.hung.clear()
    await asyncio.sleep(HUNG)
    ingress.replicas.own("r1~2", "a", first=2)
    ingress.replicas.leave("r1~2", Outcome("moved", "a"))
    await at_once()
    ingress.replicas.hung = {"a"}
    await asyncio.sleep(2 * HUNG)
    assert ingress.replicas.routes["r1~3"].chosen == "b"


# --- a suspicion costs nobody its life ----------------------------------------------------------


@virtually
@pytest.mark.parametrize("settings", [{"max_recoveries": 0}, {"max_journal_tokens": 0}])
async def test_a_request_that_could_not_go_on_elsewhere_waits_for_the_one_that_hangs(
    start, settings
):
    ingress = start(hang_s=HANG_S, **settings)
    answer = await ingress.begin(10)
    ingress.replicas.hung = {"a"}
    await asyncio.sleep(10 * HANG_S)
    ingress.replicas.send("r1", 1, [11])
    await at_once()
    assert answer.refusal is None
    assert ingress.tokens == {"r1": [10, 11]}
    assert list(ingress.replicas.submitted) == ["r1"]


@virtually
async def test_a_request_that_has_no_recovery_left_waits_for_the_one_that_hangs(start):
    ingress = start(hang_s=HANG_S, max_recoveries=1)
    answer = await ingress.begin(10)
    ingress.replicas.die("a")
    await at_once()
    await ingress.go_on("r1~2")
    ingress.replicas.hung = {"b"}
    await asyncio.sleep(10 * HANG_S)
    assert answer.refusal is None
    assert list(ingress.replicas.submitted) == ["r1", "r1~2"]


@virtually
async def test_where_there_is_nowhere_else_to_go_a_request_is_sent_there_again_now_and_then(start):
    ingress = start(replicas="a", hang_s=HANG_S)
    await ingress.begin(10)
    ingress.replicas.hung = {"a"}
    await asyncio.sleep(3.5 * HANG_S)
    *_, last = submitted = list(ingress.replicas.submitted)
    assert submitted == ["r1", "r1~2", "r1~3", "r1~4"]
    ingress.replicas.hung.clear()
    await ingress.go_on(last, 11)
    assert ingress.tokens == {"r1": [10, 11]}


@virtually
async def test_what_was_not_heard_while_the_ingress_itself_stood_still_proves_nothing(
    start, monkeypatch
):
    ingress = start(hang_s=HANG_S)
    await ingress.begin(10)
    sleep_for(10 * HANG_S, monkeypatch)
    await asyncio.sleep(HANG_S)
    assert list(ingress.replicas.submitted) == ["r1"]


@virtually
@pytest.mark.parametrize("tokens", [[], [2]])
async def test_what_came_while_the_ingress_stood_still_is_heard_before_it_is_missed(
    start, monkeypatch, tokens
):
    ingress = start()
    answer = await (ingress.begin(0) if tokens else ingress.add())
    await at_once()
    for first in tokens:
        ingress.replicas.send("r1", first, [first])
    await asyncio.sleep(WATCH_S)
    sleep_for(2 * PLACE_S, monkeypatch)
    await asyncio.sleep(WATCH_S + 0.1)
    assert answer.refusal is None
    assert list(ingress.replicas.submitted) == ["r1"]


def sleep_for(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is stopped for so long: its clock goes on, its timers do not."""
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + seconds)


@virtually
async def test_a_source_that_hangs_after_the_commit_is_not_waited_for(start):
    ingress = start(hang_s=HANG_S)
    await ingress.begin(10)
    ingress.replicas.own("r1", "b", first=1)
    ingress.replicas.hung = {"a"}
    await asyncio.sleep(HUNG)
    assert ingress.replicas.attached == [("b", "r1")]
    ingress.replicas.send("r1", 1, [11], last=True)
    await at_once()
    assert ingress.tokens == {"r1": [10, 11]}
    assert list(ingress.replicas.submitted) == ["r1"]


@virtually
async def test_a_call_that_hangs_at_a_replica_whose_death_others_have_told_of_is_given_up(start):
    ingress = start(hang_s=HANG_S)
    await ingress.begin(10)
    await asyncio.sleep(HANG_S)
    await ingress.begin(name="other")
    ingress.replicas.fail("other", EngineDead())
    await asyncio.sleep(LATE_S + SOON_S)
    assert list(ingress.replicas.submitted) == ["r1", "other", "other~2", "r1~2"]
    assert ingress.replicas.routes["r1~2"].chosen == "b"


@virtually
async def test_a_request_with_images_that_has_begun_waits_for_the_one_that_hangs(start):
    ingress = start(hang_s=HANG_S)
    await ingress.begin(10)
    (entry,) = ingress.client.journal.live()
    entry.continuable = False
    ingress.replicas.hung = {"a"}
    await asyncio.sleep(2 * HUNG)
    assert list(ingress.replicas.submitted) == ["r1"]
