"""Autoscaling: the number of replicas that queue, running batch and predicted time to the first token call for.

`replicas_wanted` is the rule. `Policy` applies it to what Ray Serve has collected; Serve itself limits the result to
the minimum and maximum, and waits for `up_after_s` and `down_after_s`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from tokenmill.deploy.load import Load
from tokenmill.deploy.plan import Scaling

_LOWEST_SHARE = 0.5
"""Part of the targets below which a replica less is wanted: the others would still be below their targets with it."""


def replicas_wanted(loads: Sequence[Load], current: int, scaling: Scaling, max_batch_size: int) -> float:
    """Return the number of replicas, perhaps fractional, at which all targets would be met.

    `loads`: of the replicas that have reported. Each target gives a ratio of load to target, and the largest decides.
    Waiting and running requests are divided among more replicas; so is the time to the first token, as far as requests
    wait. Between half the target and the target, the number stays as it is.
    """
    if not loads or not current:
        return current
    waiting = sum(load.waiting for load in loads) / len(loads)
    running = sum(load.running for load in loads) / len(loads)
    ttft_s = sum(load.ttft_s for load in loads) / len(loads)
    ratio = max(
        waiting / scaling.target_queue,
        running / (scaling.target_running * max_batch_size),
        ttft_s / scaling.target_ttft_s if waiting else 0.0,  # without a queue, a replica more makes no answer faster
    )
    if ratio > 1:
        return current * ratio
    shrunk = max(current - 1, 0)
    fits = shrunk and ratio * current / shrunk <= _LOWEST_SHARE
    idle = not waiting and not running
    return shrunk if fits or (idle and shrunk >= 0) else current


class Policy:
    """Autoscaling policy of one model, called by Ray Serve's controller."""

    def __init__(self, scaling: Mapping[str, float], max_batch_size: int) -> None:
        """Make a policy. `scaling`: fields of `plan.Scaling`; `max_batch_size`: of one replica."""
        self._scaling, self._max_batch_size = msgspec.convert(dict(scaling), Scaling), max_batch_size

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """Return the number of replicas wanted, and no state. `context`: Serve's AutoscalingContext."""
        metrics = context.aggregated_metrics or {}
        by_replica: dict[Any, dict[str, float]] = {}
        for name in Load.__struct_fields__:
            for replica, value in metrics.get(name, {}).items():
                by_replica.setdefault(replica, {})[name] = value
        loads = [Load(**values) for values in by_replica.values()]
        return replicas_wanted(loads, context.current_num_replicas, self._scaling, self._max_batch_size), {}
