"""FreenessAutoscaling: the seam to Serve's autoscaler (ray.serve.config.AutoscalingPolicy)."""

import logging
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from deployments.policy.scaling import Demand, Period, ScalingRule, scale

TELL_S = 1.0
"""Between two demands that a replica tells Serve."""

KEPT_S = 60.0
"""As long as a step may take, during which nothing is told; only the last one is looked at."""

TOLD = [field.name for field in fields(Demand)]

logger = logging.getLogger("ray.serve.llumnix")


class FreenessAutoscaling:
    """Made in Serve's controller from `policy_kwargs`, and called at each turn of its loop."""

    def __init__(self, **rule: Any) -> None:
        self._rule = ScalingRule(**rule)
        self._failed = False

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of replicas that there should be, and the state to keep."""
        try:
            decision = self._decide(ctx)
        except Exception:  # Serve would update no application any more
            if not self._failed:
                logger.exception("the number of instances stays as it is: scaling failed")
            self._failed = True
            return ctx.target_num_replicas, ctx.policy_state
        self._failed = False
        return decision

    def _decide(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        demands, present, now = list(_demands(ctx)), ctx.target_num_replicas, ctx.current_time
        starting = max(0, present - len(demands))
        period = ctx.policy_state.get("period") or Period(now)
        wanted, period = scale(demands, starting, present, period, now, self._rule)
        if wanted != present:
            logger.info(
                "instances: %d -> %d; %d requests demand %.0f of %d KV blocks",
                present, wanted,
                sum(demand.requests for demand in demands),
                sum(demand.blocks for demand in demands),
                sum(demand.blocks_total for demand in demands),
            )  # fmt: skip
        return wanted, {"period": period}


def autoscaling_config(rule: ScalingRule, initial: int | None) -> AutoscalingConfig:
    """Serve's settings for it. Its own delays are 0: the policy has a period.

    Serve begins with `initial` replicas whenever a changed fleet is deployed; None: with as many as
    there are.
    """
    return AutoscalingConfig(
        min_replicas=rule.min,
        max_replicas=rule.max,
        initial_replicas=initial,
        upscale_delay_s=0,
        downscale_delay_s=0,
        metrics_interval_s=TELL_S,
        look_back_period_s=KEPT_S,
        policy=AutoscalingPolicy(policy_function=FreenessAutoscaling, policy_kwargs=asdict(rule)),
    )


def _demands(ctx: AutoscalingContext) -> Iterator[Demand]:
    """The last ones told; a replica that loads its model has told none."""
    metrics = ctx.raw_metrics or {}  # made anew each time one asks
    told = [metrics.get(name, {}) for name in TOLD]
    for replica_id in ctx.running_replicas:
        last = [series[replica_id][-1].value for series in told if series.get(replica_id)]
        if len(last) == len(TOLD):
            yield Demand(*last)
