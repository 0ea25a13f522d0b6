"""Whether a request can have had two owners."""

import pytest

from load_tests.chaos.watch import longest_excess_s
from tests.load_tests.chaos.runs import look


def test_as_many_requests_as_streams_have_one_owner_each():
    assert longest_excess_s([look(0, 2), look(1, 1), look(2, 2)]) == 0
    assert longest_excess_s([]) == 0


def test_the_longest_time_of_more_is_told():
    looks = [look(0, 3), look(1, 2), look(2, 3), look(3, 4), look(4.5, 2), look(5, 3)]
    assert longest_excess_s(looks) == pytest.approx(2.5)


def test_one_that_never_ends_counts_as_long_as_it_was_seen():
    assert longest_excess_s([look(0, 2), look(1, 3), look(9, 3)]) == pytest.approx(8)
