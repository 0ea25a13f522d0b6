"""What load tests hear of a fleet, and wait for; the fleet answers what the test says."""

from typing import Any

import pytest

from load_tests.fleet_api import (
    FleetApi,
    held,
    is_moving,
    settled,
    states,
    with_work,
    without,
)
from load_tests.servers import ServerFailed
from tests.virtual import virtually


def replica(name, running=0, waiting=0, state="running", moving_in=0, moving_out=0):
    moving = {"migrating_in": moving_in, "migrating_out": moving_out, "blocks_used": 0}
    return {
        "replica_id": name, "state": state, "running": running, "waiting": waiting, **moving
    }  # fmt: skip


OVERVIEW = {
    "replicas": [
        replica("a", running=3, moving_out=1),
        replica("b", running=1, waiting=2, moving_in=1),
        replica("c", state="starting"),
    ]
}


FULL = {"replicas": [replica("a"), replica("b")]}
BUSY = {"replicas": [replica("a"), replica("b", running=1)]}


class Answers(FleetApi):
    """One answer after the other, the last one for ever; None: nobody answers."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    async def _get(self, path: str) -> Any:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is None:
            raise ServerFailed(f"GET {path}")
        return answer


def test_what_is_down_does_not_count():
    assert held(OVERVIEW) == 6
    assert held(without(OVERVIEW, {"b"})) == 3
    assert states(without(OVERVIEW, {"a", "b"})) == ["starting"]


def test_those_with_work_are_the_ones_to_hit():
    assert with_work(OVERVIEW) == {"a", "b"}


def test_a_move_is_seen_at_both_ends():
    assert is_moving(OVERVIEW, "a", "b")
    assert not is_moving(OVERVIEW, "b", "a")
    assert not is_moving(OVERVIEW, "a", "c")
    assert not is_moving(OVERVIEW, "gone", "b")


def test_a_fleet_is_settled_when_exactly_as_many_run_as_were_asked_for():
    assert settled(FULL, 2)
    assert not settled(FULL, 3)
    assert not settled(OVERVIEW, 3)
    assert not settled({"replicas": []}, 2)


def test_an_update_is_over_when_every_instance_is_another():
    assert settled(FULL, 2, but={"c", "d"})
    assert not settled(FULL, 2, but={"b", "c"})


@virtually
async def test_a_fleet_that_does_not_answer_shows_no_instances():
    assert await Answers(None).overview() == {"replicas": []}
    assert await Answers(None).place("r1") is None


@virtually
async def test_a_request_is_where_it_went_last():
    assert await Answers({"replicas": ["a", "b"]}).place("r1") == "b"
    assert await Answers({"replicas": []}).place("r1") is None


@virtually
async def test_waiting_for_a_fleet_outlasts_what_does_not_answer():
    assert await Answers(None, OVERVIEW, FULL).until_running(2, within_s=9) == {"a", "b"}


@virtually
async def test_waiting_has_an_end_that_says_what_was_missing():
    with pytest.raises(ServerFailed, match="no 3 instances after 9 s"):
        await Answers(FULL).until_running(3, within_s=9)


@virtually
async def test_a_fleet_at_rest_leaks_nothing():
    assert await Answers(BUSY, FULL, None).leaks(2, within_s=9) == []


@virtually
async def test_what_is_left_after_that_time_is_a_leak():
    assert await Answers(BUSY).leaks(2, within_s=9) == ["b still has 1 running"]
