"""What grew, and what did not."""

import pytest

from load_tests.chaos.growth import ACTORS, growth
from load_tests.chaos.processes import INGRESS, REPLICA
from tests.load_tests.chaos.runs import usage


def samples(rss=lambda at: 1000.0, **more):
    """A hundred, a second apart."""
    return [usage(at, rss(at), **{key: of(at) for key, of in more.items()}) for at in range(101)]


def grown(found):
    return {(one.role, one.what) for one in found if not one.flat}


def test_what_stays_as_it_is_is_flat():
    found = growth(samples())
    assert not grown(found)
    assert {one.role for one in found} >= {REPLICA, INGRESS, ACTORS}


def test_what_grows_all_the_time_is_told():
    found = growth(samples(rss=lambda at: 1000.0 + 5 * at, fds=lambda at: 50 + at))
    assert {what for _, what in grown(found)} == {"rss_mib", "fds"}
    (one,) = (one for one in found if (one.role, one.what) == (INGRESS, "fds"))
    assert (one.before, one.after) == (pytest.approx(82.5), pytest.approx(142.5))


def test_warming_up_is_no_growth():
    assert not grown(growth(samples(rss=lambda at: 1000.0 if at > 24 else 10.0)))


def test_more_instances_are_not_more_memory_each():
    found = growth(samples(replicas=lambda at: 2 if at < 50 else 4))
    assert grown(found) == {(ACTORS, "processes")}


def test_too_short_a_run_says_nothing():
    assert growth([]) == []
    assert growth([usage(0.0), usage(30.0)]) == []
