"""How the YAML's `args` reach Serve's deployments."""

import pytest
from ray.serve import Application

from app.config import load
from app.main import build_fleet
from deployments.messages import REPLICA


def replicas(**args):
    """The deployment of the instances."""
    model = {"model_id": "emulated", "model_source": "org/tiny"}
    emulated = {"emulated": {"profile": "a10-llama-7b"}}
    application = build_fleet(load({"model": model, "engine": emulated} | args))
    parts = application._bound_deployment.init_args
    deployments = [part._bound_deployment for part in parts if isinstance(part, Application)]
    return next(deployment for deployment in deployments if deployment.name == REPLICA)


@pytest.mark.parametrize(("args", "number"), [({}, 2), ({"replicas": 3}, 3)])
def test_a_number_of_replicas_stays_as_it_is(args, number):
    deployment = replicas(**args)
    assert deployment.num_replicas == number
    assert deployment._deployment_config.autoscaling_config is None


def test_serve_scales_by_every_key_of_autoscaling():
    bounds = {"min": 2, "max": 7, "initial": 4}
    thresholds = {"freeness_low": 5.0, "freeness_high": 50.0, "period_s": 3.0}
    deployment = replicas(autoscaling=bounds | thresholds)
    scaled = deployment._deployment_config.autoscaling_config
    assert (scaled.min_replicas, scaled.initial_replicas, scaled.max_replicas) == (2, 4, 7)
    assert scaled.policy.policy_kwargs == {"min": 2, "max": 7} | thresholds


def test_an_update_leaves_a_scaled_fleet_as_large_as_it_is():
    scaled = replicas(autoscaling={"min": 2, "max": 7})._deployment_config.autoscaling_config
    assert (scaled.min_replicas, scaled.initial_replicas) == (2, None)
