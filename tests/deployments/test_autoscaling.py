"""The policy as Serve makes and calls it: what it reads and keeps, and that it never raises."""

import logging
from dataclasses import asdict

import pytest
from ray.serve._private.autoscaling_state import _resolve_policy_callable
from ray.serve._private.common import DeploymentID, TimeStampedValue
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingContext

from deployments.autoscaling import autoscaling_config
from deployments.policy.scaling import Demand, ScalingRule

RULE = ScalingRule(min=1, max=4, freeness_low=10, freeness_high=60, period_s=10)
FULL, IDLE = Demand(1000, 980, 10), Demand(1000, 0, 0)
CONFIG = autoscaling_config(RULE, initial=2)


class Serve:
    """Its controller: calls the policy once a second, keeps its state and obeys at once."""

    def __init__(self, target):
        self.policy = _apply_autoscaling_config(_resolve_policy_callable(CONFIG.policy))
        self.target, self.state, self.now = target, {}, 1000.0

    def turn(self, told, running=None):
        """`told`: the last Demand of each replica, or what else it told; `running`: their ids."""
        self.now += 1
        metrics = {}
        for replica, demand in told.items():
            numbers = asdict(demand) if isinstance(demand, Demand) else demand
            for name, value in numbers.items():
                series = [TimeStampedValue(self.now - 2, 0), TimeStampedValue(self.now - 1, value)]
                metrics.setdefault(name, {})[replica] = series
        self.target, self.state = self.policy(self.context(metrics, list(running or told)))
        return self.target

    def context(self, metrics, running):
        return AutoscalingContext(
            deployment_id=DeploymentID("LLMReplica", "llama"),
            deployment_name="LLMReplica",
            app_name="llama",
            current_num_replicas=len(running),
            target_num_replicas=self.target,
            running_replicas=running,
            total_num_requests=0.0,
            total_queued_requests=0.0,
            aggregated_metrics=lambda: {},
            raw_metrics=lambda: metrics,
            capacity_adjusted_min_replicas=CONFIG.min_replicas,
            capacity_adjusted_max_replicas=CONFIG.max_replicas,
            policy_state=dict(self.state),
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=self.now,
            config=CONFIG,
        )

    def turns(self, count, told, running=None):
        return [self.turn(told, running) for _ in range(count)]


def test_serve_gets_its_bounds_and_no_delays_of_its_own():
    assert (CONFIG.min_replicas, CONFIG.initial_replicas, CONFIG.max_replicas) == (1, 2, 4)
    assert (CONFIG.upscale_delay_s, CONFIG.downscale_delay_s) == (0, 0)
    assert CONFIG.look_back_period_s > CONFIG.metrics_interval_s


def test_the_last_demand_that_replicas_told_decides_after_a_period():
    serve = Serve(target=1)
    assert serve.turns(11, {"a": FULL}) == [1] * 10 + [2]


def test_a_replica_that_loads_its_model_is_no_idle_one():
    serve = Serve(target=2)
    assert serve.turns(30, {"a": FULL})[-1] == 2
    assert serve.turns(30, {"a": FULL}, running=["a", "b"])[-1] == 2  # up, and has told nothing yet
    assert serve.turns(11, {"a": IDLE, "b": IDLE})[-1] == 1


def test_replicas_that_stop_count_no_more():
    serve = Serve(target=1)
    assert serve.turns(30, {"a": Demand(1000, 500, 10), "b": FULL}, running=["a"])[-1] == 1


def test_nothing_happens_before_anything_is_told():
    assert Serve(target=2).turns(30, {}, running=["a", "b"])[-1] == 2


def test_why_the_number_changes_is_logged(caplog):
    with caplog.at_level(logging.INFO, "ray.serve.llumnix"):
        Serve(target=1).turns(11, {"a": FULL})
    assert caplog.messages[-1] == "instances: 1 -> 2; 10 requests demand 980 of 1000 KV blocks"


@pytest.mark.parametrize("nonsense", [{**asdict(FULL), "blocks": "many"}, {"blocks_total": 1000}])
def test_it_never_raises_and_says_once_what_is_wrong(nonsense, caplog):
    serve = Serve(target=3)
    assert serve.turns(30, {"a": nonsense}) == [3] * 30
    failures = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(failures) == ("many" in nonsense.values())


def test_it_goes_on_after_a_failure():
    serve = Serve(target=1)
    serve.turns(3, {"a": {**asdict(FULL), "blocks": "many"}})
    assert serve.turns(11, {"a": FULL})[-1] == 2
