"""`import_path: app.main:build_app`: the Serve application of a fleet."""

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from app.check import validate_args
from app.config import FleetConfig
from app.ingress import Ingress
from app.resources import resources
from app.validation import ConfigError
from deployments.autoscaling import autoscaling_config
from deployments.messages import INGRESS, REPLICA, SCHEDULER
from deployments.policy.pairing import PairingRule
from deployments.policy.scaling import ScalingRule
from deployments.replica import LLMReplica
from deployments.router import FleetRouter
from deployments.scheduler import Scheduler

MAX_ONGOING = 8192
"""Open calls to one replica: vLLM's own queue is the place to wait in, where freeness sees it."""

DRAIN_S = 600.0
"""Serve kills a replica that still holds requests after this: those that cannot move may end. One
that is empty leaves at once."""

STREAMS_S = 3600.0
"""The same for an ingress: its clients' streams cannot move, and end there."""

QUIET = {"enable_access_log": False}
"""Serve would log a line for each call, ten times a second for each instance's reports alone."""


def build_app(args: dict[str, Any]) -> Application:
    """From the YAML's `args`. Raises ValueError with one line that names what is wrong."""
    try:
        config = validate_args(args)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return build_fleet(config)


def build_fleet(config: FleetConfig, worker_extension: str | None = None) -> Application:
    """Ingress, Scheduler, instances. Serve's YAML may override options by deployment name.

    `worker_extension`: vLLM's `worker_extension_cls`, where it is not the engine's usual one.
    """
    replica = serve.deployment(LLMReplica).options(
        name=REPLICA,
        **_instances(config),
        max_ongoing_requests=MAX_ONGOING,
        **resources(config),
        request_router_config=RequestRouterConfig(
            request_router_class=FleetRouter,
            request_router_kwargs={
                "dispatch": config.dispatch,
                "headroom_tokens": config.headroom_tokens,
            },
        ),
        health_check_period_s=1,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=DRAIN_S,
        logging_config=QUIET,
    )
    scheduler = serve.deployment(Scheduler).options(
        name=SCHEDULER,
        num_replicas=1,
        max_ongoing_requests=MAX_ONGOING,
        ray_actor_options={"num_cpus": 0},
        max_surge_percent=100,  # in an update the new one comes before the old one leaves
        health_check_period_s=1,
        logging_config=QUIET,
    )
    ingress = serve.deployment(serve.ingress()(Ingress)).options(
        name=INGRESS,
        num_replicas=1,
        max_ongoing_requests=MAX_ONGOING,
        ray_actor_options={"num_cpus": 0},
        max_surge_percent=100,
        health_check_period_s=1,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=STREAMS_S,
        logging_config=QUIET,
    )
    return ingress.bind(
        config,
        replica.bind(config, worker_extension),
        scheduler.bind(config.dispatch, pairing_rule(config)),
    )


def pairing_rule(config: FleetConfig) -> PairingRule | None:
    """When the scheduler pairs instances; None where requests do not move by themselves."""
    settings = config.migration
    if not settings.enabled:
        return None
    return PairingRule(
        settings.out_threshold, settings.in_threshold, settings.min_gain, settings.max_concurrent
    )


def scaling_rule(config: FleetConfig) -> ScalingRule | None:
    """How many instances there should be; None where their number is given."""
    settings = config.autoscaling
    if settings is None:
        return None
    return ScalingRule(
        settings.min,
        settings.max,
        settings.freeness_low,
        settings.freeness_high,
        settings.period_s,
    )


def _instances(config: FleetConfig) -> dict[str, Any]:
    rule, settings = scaling_rule(config), config.autoscaling
    if rule is None or settings is None:
        return {"num_replicas": config.replicas}
    return {"autoscaling_config": autoscaling_config(rule, settings.initial)}
