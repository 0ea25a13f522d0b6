"""Which request leaves an instance."""

import math

from deployments.policy.selection import Movable, choose_request


def movable(
    name: str, priority: int = 0, tokens: int = 100, blocks: int = 7, waiting: bool = False, **rest
) -> Movable:
    defaults = {"arrived": 0.0, "frees": 0 if waiting else blocks}
    return Movable(name, priority, tokens, blocks, **defaults | rest)


def chosen(
    *requests: Movable,
    room: float = 1000,
    deficit: int = 0,
    before: tuple[float, float] = (math.inf, math.inf),
) -> str | None:
    return choose_request(requests, room, deficit, before)


def test_nothing_movable_nothing_chosen():
    assert chosen() is None


def test_the_less_urgent_leaves_first():
    urgent, normal = movable("urgent", priority=-10, tokens=1), movable("normal", priority=0)
    assert chosen(urgent, normal) == "normal"


def test_of_equal_urgency_the_shorter_leaves_first():
    assert chosen(movable("long", tokens=900), movable("short", tokens=90)) == "short"


def test_of_equal_urgency_one_that_waits_leaves_before_a_shorter_one_that_runs():
    waits = movable("waits", tokens=900, waiting=True)
    assert chosen(movable("runs", tokens=9), waits) == "waits"


def test_of_those_that_wait_the_head_of_line_leaves_first():
    head = movable("head", tokens=900, waiting=True)
    assert chosen(head, movable("next", tokens=9, waiting=True)) == "head"


def test_an_urgent_one_that_waits_stays_longer_than_a_less_urgent_one_that_runs():
    waits = movable("waits", priority=-10, waiting=True)
    assert chosen(waits, movable("runs", priority=0)) == "runs"


def test_what_does_not_fit_there_stays():
    head = movable("head", blocks=200, waiting=True)
    assert chosen(head, movable("runs", blocks=100), room=100) == "runs"
    assert chosen(head, movable("runs", blocks=100), room=99) is None


def test_the_shortest_that_makes_room_for_the_head_of_line_leaves():
    sizes = {"small": 2, "enough": 30, "more": 80}
    running = [movable(name, tokens=16 * n, blocks=n) for name, n in sizes.items()]
    assert chosen(*running, deficit=30) == "enough"


def test_what_it_takes_there_makes_no_room_here():
    little = movable("little", tokens=480, blocks=34, frees=30)
    enough = movable("enough", tokens=510, blocks=36, frees=32)
    assert chosen(little, enough, deficit=31) == "enough"


def test_where_none_alone_makes_room_the_largest_that_fits_leaves():
    running = [movable(str(n), tokens=16 * n, blocks=n) for n in (2, 30, 80)]
    assert chosen(*running, deficit=100) == "80"
    assert chosen(*running, deficit=100, room=50) == "30"


def test_what_waits_goes_only_where_it_would_come_first():
    early, late = (movable(n, waiting=True, arrived=at) for n, at in (("early", 10), ("late", 30)))
    assert chosen(late, early, before=(0, 20)) == "early"
    assert chosen(late, movable("runs", arrived=40), before=(0, 20)) == "runs"
    assert chosen(late, before=(0, 20)) is None


def test_the_more_urgent_comes_first_however_late_it_is():
    urgent = movable("urgent", priority=-10, waiting=True, arrived=30)
    assert chosen(urgent, before=(0, 20)) == "urgent"
    assert chosen(movable("normal", waiting=True, arrived=10), before=(-10, 20)) is None


def test_what_stays_leaves_only_where_blocks_are_lacking():
    urgent = movable("urgent", priority=-10, stays=True)
    assert chosen(urgent) is None
    assert chosen(urgent, deficit=1) == "urgent"


def test_even_then_others_leave_before_it():
    urgent = movable("urgent", priority=-10, waiting=True, stays=True)
    assert chosen(urgent, movable("runs"), deficit=7) == "runs"
    assert chosen(urgent, movable("too large", blocks=2000), deficit=7) == "urgent"


def test_the_choice_does_not_depend_on_the_order_of_equals():
    equals = [movable(name) for name in "cab"]
    assert chosen(*equals) == chosen(*reversed(equals)) == "a"
