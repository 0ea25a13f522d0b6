"""A fleet that is scaled under the virtual clock, from one to three small instances and back."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from app.config import load
from load_tests.outcome import Sample, Served
from load_tests.simulator import controller
from load_tests.simulator.fleet import SAMPLE_S, Simulation
from load_tests.simulator.network import Delays
from load_tests.traces.trace import TraceRequest

LOAD_S = 5.0
SCALED = {"max": 3, "freeness_low": 1, "freeness_high": 8, "period_s": 2}

BUSY = [TraceRequest(n / 4, 200, 120) for n in range(80)]
QUIET = [TraceRequest(20.0 + 2 * n, 50, 500 if n % 2 else 50) for n in range(10)]


@dataclass
class Scaled:
    """What came of it."""

    served: list[Served]
    samples: list[Sample]

    def states(self) -> Iterator[dict[str, str]]:
        """Of each instance that is there, twice a second."""
        for sample in self.samples:
            yield {load.replica_id: load.state for load in sample.loads}

    def seconds(self, replica_id: str, state: str) -> float:
        """That an instance was seen in a state."""
        return SAMPLE_S * sum(states.get(replica_id) == state for states in self.states())


def play(args, trace, **changes) -> Scaled:
    config = load({**args, "dispatch": "freeness", "autoscaling": SCALED, **changes})
    simulation = Simulation(config, seed=0, delays=Delays(load=LOAD_S))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(controller, "FIRST_S", 0.0)
        simulation.run(trace, lambda: None)
    return Scaled(simulation.served, simulation.samples)


@pytest.fixture(scope="module")
def moving(args) -> Scaled:
    return play(args, BUSY + QUIET)


@pytest.fixture(scope="module")
def staying(args) -> Scaled:
    return play(args, BUSY + QUIET, migration={"enabled": False})


def test_instances_come_under_load_and_go_after_it(moving):
    numbers = [len(states) for states in moving.states()]
    assert (numbers[0], max(numbers)) == (1, 3)
    assert numbers.index(3) * SAMPLE_S < 20
    assert 1 in numbers[numbers.index(3) :]


def test_no_request_is_lost_to_it(moving, staying):
    for scaled in (moving, staying):
        assert [one.error for one in scaled.served] == [""] * 90
        asked = [request.output_tokens for request in BUSY + QUIET]
        assert [len(one.tokens) for one in scaled.served] == asked


def test_an_instance_loads_its_model_before_it_takes_requests(moving):
    assert moving.seconds("i0001", "starting") == pytest.approx(LOAD_S, abs=SAMPLE_S)
    loading = (
        load for sample in moving.samples for load in sample.loads if load.state == "starting"
    )
    assert all(load.blocks_used == load.running == 0 for load in loading)


def test_what_is_not_up_yet_stops_first(args):
    burst = [TraceRequest(0.0, 200, 30)] * 16
    scaled = play(args, [*burst, TraceRequest(12.0, 20, 20)])
    seen = [set(states.items()) for states in scaled.states()]
    assert ("i0001", "starting") in set.union(*seen)
    assert {name for there in seen for name, state in there if state == "running"} == {"i0000"}
    assert seen[-1] == {("i0000", "running")}


def test_the_newest_stops_first(moving):
    drained = [name for states in moving.states() for name in states if states[name] == "draining"]
    assert list(dict.fromkeys(drained))[:2] == ["i0002", "i0001"]


def test_moves_empty_an_instance_long_before_its_requests_end(moving, staying):
    assert moving.seconds("i0002", "draining") <= 2
    assert staying.seconds("i0002", "draining") >= 5


def test_nothing_loads_where_others_still_drain(args):
    """Three GPUs: what is wanted beyond that waits for the one that empties itself last."""
    again = [TraceRequest(31.0 + n / 4, 200, 120) for n in range(40)]
    scaled = play(args, BUSY + QUIET[:6] + again, migration={"enabled": False})
    assert max(len(states) for states in scaled.states()) == 3
