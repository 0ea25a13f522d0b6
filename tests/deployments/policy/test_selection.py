"""Which request leaves an instance."""

from deployments.policy.selection import Movable, choose_request


def movable(name: str, priority: int = 0, tokens: int = 100, waiting: bool = False) -> Movable:
    return Movable(name, priority, tokens, waiting)


def test_nothing_movable_nothing_chosen():
    assert choose_request([]) is None


def test_the_less_urgent_leaves_first():
    urgent, normal = movable("urgent", priority=-10, tokens=1), movable("normal", priority=0)
    assert choose_request([urgent, normal]) == "normal"


def test_of_equal_urgency_the_shorter_leaves_first():
    assert choose_request([movable("long", tokens=900), movable("short", tokens=90)]) == "short"


def test_of_equal_urgency_one_that_waits_leaves_before_a_shorter_one_that_runs():
    waits = movable("waits", tokens=900, waiting=True)
    assert choose_request([movable("runs", tokens=9), waits]) == "waits"


def test_an_urgent_one_that_waits_stays_longer_than_a_less_urgent_one_that_runs():
    waits = movable("waits", priority=-10, waiting=True)
    assert choose_request([waits, movable("runs", priority=0)]) == "runs"


def test_the_choice_does_not_depend_on_the_order_asked_in():
    equals = [movable(name) for name in "cab"]
    assert choose_request(equals) == choose_request(reversed(equals)) == "a"
