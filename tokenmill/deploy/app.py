"""The application for Ray Serve: `import_path: tokenmill.deploy.app:build`, with a `plan.Plan` as its `args`.

One deployment for each model, and one ingress before them. The ranks of a replica that fit one host belong to one
actor, which reserves the resources of all of them: the server's supervisor starts, watches and restarts ranks, so an
actor for each would only be a second parent. Ranks on several hosts have a placement group with one bundle a host.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

import msgspec
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import Receive, Scope, Send

from tokenmill.deploy.front import Front
from tokenmill.deploy.messages import Ask, Head, ReplicaInfo, ReplicaLost
from tokenmill.deploy.plan import Model, Plan, plan_of, resources_of, settings_of
from tokenmill.deploy.replica import Replica
from tokenmill.deploy.selection import Served

_UNLIMITED = 1_000_000
"""Requests that Serve lets a replica have. The server itself refuses those beyond its limit, with 429."""
_STOP_S = 15.0
"""Time to end a server after its requests have ended."""
_STARTS = 2
"""Starts of a replica that may fail before a deployment fails: most causes are those of every replica."""
_STATS_PERIOD_S = 1.0
_HEALTH_PERIOD_S, _HEALTH_TIMEOUT_S = 2.0, 10.0
_DEFAULT_BATCH = 128

log = logging.getLogger(__name__)


class ServedReplica:
    """The actor of a replica, as Ray Serve makes and calls it."""

    async def __init__(self, model: dict[str, Any], threads: int) -> None:  # type: ignore[misc]  # Serve awaits it
        """Start the server and wait until it is ready."""
        plan = msgspec.convert(model, Model)
        name = serve.get_replica_context().replica_id.unique_id
        host = ray.util.get_node_ip_address() if plan.direct else ""
        self._replica = Replica(name, plan, threads, host)
        await self._replica.start()

    async def send(self, ask: Ask) -> AsyncGenerator[Head | bytes, None]:
        """See `Replica.send`."""
        async for part in self._replica.send(ask):
            yield part

    async def fetch(self, ask: Ask) -> tuple[Head, bytes]:
        """See `Replica.fetch`."""
        return await self._replica.fetch(ask)

    async def info(self, ask: Ask | None = None) -> ReplicaInfo:
        """See `Replica.info`."""
        return await self._replica.info(ask)

    async def check_health(self) -> None:
        """See `Replica.check_health`. Called by Serve."""
        await self._replica.check_health()

    async def record_routing_stats(self) -> dict[str, float]:
        """See `Replica.record_routing_stats`. Called by Serve."""
        return await self._replica.record_routing_stats()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """See `Replica.record_autoscaling_stats`. Called by Serve."""
        return await self._replica.record_autoscaling_stats()

    async def record_replica_metadata(self) -> dict[str, float]:
        """Return what does not change while the replica lives. Called by Serve."""
        return {"capacity": (await self._replica.record_routing_stats())["capacity"]}

    async def __del__(self) -> None:
        """Stop the server. Called by Serve after the last request."""
        with suppress(AttributeError):  # the server did not start
            await self._replica.stop()


class Ingress:
    """The deployment that Serve's proxy sends every request to."""

    def __init__(self, plan: dict[str, Any], *handles: DeploymentHandle) -> None:
        """Make the front of all models. `handles`: of their deployments, in the plan's order."""
        models = msgspec.convert(plan, Plan).models
        settings = [settings_of(model) for model in models]
        served = [
            Served(model.name, one.model_id, may_sleep=model.min_replicas == 0)
            for model, one in zip(models, settings, strict=True)
        ]
        replicas = map(HandleReplicas, handles)
        self._front = Front(dict(zip(served, replicas, strict=True)), max(one.payload_limit for one in settings))

    def routing_times(self) -> list[tuple[float, float]]:
        """Return the seconds that the last choices of a replica took, of wall time and of CPU time."""
        return list(self._front.routing_times)

    def num_continued(self) -> int:
        """Return the number of streams that have gone on at another replica."""
        return self._front.num_continued

    def __serve_build_asgi_app__(self) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
        return self._front


class HandleReplicas:
    """The replicas of a model behind a handle of Ray Serve: see `messages.Replicas`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._send = handle.options(method_name="send", stream=True)

    async def send(self, ask: Ask) -> AsyncGenerator[Head | bytes, None]:
        """See `messages.Replicas`."""
        response = self._send.remote(ask)
        ended = False
        try:
            async for part in response:
                yield part
            ended = True
        except (RayError, RayServeException) as error:
            ended = True
            raise ReplicaLost(_cause(error)) from None
        finally:
            if not ended:  # the client left, or the answer is not wanted
                response.cancel()

    async def info(self, ask: Ask) -> ReplicaInfo:
        """See `messages.Replicas`."""
        try:
            found: ReplicaInfo = await self._handle.info.remote(ask)
        except (RayError, RayServeException) as error:
            raise ReplicaLost(_cause(error)) from None
        return found

    async def infos(self) -> list[ReplicaInfo]:
        """See `messages.Replicas`."""
        return await self._all("info")

    async def broadcast(self, ask: Ask) -> list[tuple[Head, bytes]]:
        """See `messages.Replicas`."""
        return await self._all("fetch", ask)

    async def _all(self, method: str, *arguments: Any) -> list[Any]:
        response = self._handle.broadcast(method, *arguments)
        found = await response.results_async(return_exceptions=True)
        return [result for result in found if not isinstance(result, BaseException)]


def _cause(error: Exception) -> str:
    """Return the first line of what an exception of Ray tells."""
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def build(args: Mapping[str, Any]) -> Any:
    """Return the application that `args` describe (see `plan.Plan`). Raises ArgumentError.

    Called by `serve run`, `serve deploy` and KubeRay with the config's `args`, and by `tokenmill deploy`.
    """
    plan = plan_of(args)
    has_gpus = ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0
    models = [_deployment(model, has_gpus) for model in plan.models]
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="ingress",
        num_replicas=plan.ingress_replicas,
        max_ongoing_requests=_UNLIMITED,
        ray_actor_options={"num_cpus": 0},  # it waits for replicas and clients most of the time
        graceful_shutdown_timeout_s=max(map(_drain_s, plan.models)),
        health_check_period_s=_HEALTH_PERIOD_S,
    )
    public = msgspec.structs.replace(
        plan, models=tuple(msgspec.structs.replace(model, environment={}) for model in plan.models)
    )
    return ingress.bind(msgspec.to_builtins(public), *models)


def _drain_s(model: Model) -> float:
    """Return the seconds that a process gets to end, with its requests. An update replaces the ingress, too."""
    return settings_of(model).graceful_termination_timeout + _STOP_S


def _deployment(model: Model, cluster_has_gpus: bool) -> Any:
    """Return the bound deployment of one model."""
    settings, resources = settings_of(model), resources_of(model, cluster_has_gpus)
    options: dict[str, Any] = {
        "name": model.name,
        "max_ongoing_requests": _UNLIMITED,
        "max_constructor_retry_count": _STARTS,
        "graceful_shutdown_timeout_s": _drain_s(model),
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": _HEALTH_PERIOD_S,
        "health_check_timeout_s": _HEALTH_TIMEOUT_S,
        "request_router_config": {
            "request_router_class": "tokenmill.deploy.routing:PrefixRouter",
            "request_router_kwargs": {"at_random": model.routing == "random"},
            "request_routing_stats_period_s": _STATS_PERIOD_S,
        },
        "ray_actor_options": {"num_cpus": resources.cpus / model.nodes, "num_gpus": resources.gpus / model.nodes},
        **_replicas(model, (settings.max_batch_size or _DEFAULT_BATCH) * settings.data_parallel_size),
    }
    if model.nodes > 1:
        options |= {
            "placement_group_bundles": [dict(bundle) for bundle in resources.bundles],
            "placement_group_strategy": "STRICT_SPREAD",
        }
    return serve.deployment(ServedReplica, **options).bind(msgspec.to_builtins(model), resources.threads)


def _replicas(model: Model, max_batch_size: int) -> dict[str, Any]:
    """Return Serve's options for the number of replicas."""
    if model.min_replicas == model.max_replicas:
        return {"num_replicas": model.min_replicas}
    scaling = model.scaling
    return {
        "autoscaling_config": {
            "min_replicas": model.min_replicas,
            "max_replicas": model.max_replicas,
            "upscale_delay_s": scaling.up_after_s,
            "downscale_delay_s": scaling.down_after_s,
            "look_back_period_s": scaling.look_back_s,
            "policy": {
                "policy_function": "tokenmill.deploy.scaling:Policy",
                "policy_kwargs": {"scaling": msgspec.to_builtins(scaling), "max_batch_size": max_batch_size},
            },
        }
    }
