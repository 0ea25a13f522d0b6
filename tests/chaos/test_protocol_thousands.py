"""Ten thousand moves in virtual time, other ones in every run: see tests/migration/sim/world.py."""

import pytest
from hypothesis import given, settings

from tests.migration.sim.scenario import Scenario
from tests.migration.test_protocol_properties import ORDINARY, check, scenarios

pytestmark = pytest.mark.e2e


@settings(ORDINARY, max_examples=10_000, derandomize=False)
@given(scenarios)
def test_whatever_happens_ten_thousand_times_one_instance_owns_the_request(scenario: Scenario):
    check(scenario)
