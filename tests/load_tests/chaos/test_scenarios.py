"""The scenarios are configurations that a fleet takes."""

import pytest

from app.config import load
from load_tests.chaos.scenarios import BLOCKS, HANG_S, SCENARIOS

EACH = pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=lambda scenario: scenario.name)


@EACH
def test_a_scenario_is_a_fleet(scenario, tmp_path):
    (application,) = scenario.yaml(tmp_path)["applications"]
    config = load(application["args"])
    assert config.replicas == scenario.instances
    assert bool(config.engine.emulated) == (scenario.workload == "emulated")
    assert config.recovery.hang_s == HANG_S
    assert (config.recovery.max_recoveries == 0) == (scenario.name == "control")


@EACH
def test_a_scenario_comes_to_an_end(scenario):
    assert scenario.streams or scenario.kills or scenario.minutes


def test_the_emulated_gpu_has_less_memory_and_a_slower_link(tmp_path):
    from deployments.emulated.profile import load_profile

    SCENARIOS["kills-emulated"].yaml(tmp_path)
    a10, small = load_profile("a10-llama-7b"), load_profile(str(tmp_path / "small-a10.json"))
    assert small.blocks == BLOCKS < a10.blocks
    assert small.copy_time_s(500) > 3 * a10.copy_time_s(500)
    assert small.weights_s == a10.weights_s


def test_fewer_streams_are_fewer_kills_and_other_minutes_change_nothing_else():
    scenario = SCENARIOS["kills-emulated"]
    assert scenario.scaled(None, None) == scenario
    tenth = scenario.scaled(streams=scenario.streams // 10, minutes=None)
    assert 0 < tenth.kills < scenario.kills / 5
    assert SCENARIOS["soak"].scaled(None, minutes=1.0).minutes == 1.0
