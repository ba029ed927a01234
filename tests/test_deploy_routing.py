"""The request router that Ray Serve runs, with replicas of this file; needs Ray, but no cluster."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray.serve")

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID

from tokenmill.deploy.messages import Ask
from tokenmill.deploy.routing import PrefixRouter

DEPLOYMENT = DeploymentID(name="m", app_name="a")


class FakeReplica:
    """A running replica as Serve describes it to routers."""

    def __init__(self, name: str, **stats: float) -> None:
        self.replica_id = ReplicaID(unique_id=name, deployment_id=DEPLOYMENT)
        self.replica_metadata = {"capacity": 100_000.0}
        self.routing_stats = {"running": 0.0, "waiting": 0.0, "up": 1.0, **stats} if stats else {}
        self.max_ongoing_requests = 100

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return 0


class Routing:
    """A router, and requests to it."""

    def __init__(self, *replicas: FakeReplica, **options: Any) -> None:
        self.router = PrefixRouter(deployment_id=DEPLOYMENT, handle_source=DeploymentHandleSource.REPLICA)
        self.router.initialize_state(seed=1, **options)
        self.router.update_replicas(list(replicas))  # type: ignore[arg-type]
        self.replicas = list(replicas)
        self.count = 0

    async def choose(self, prompt: str, tokens: int = 100, exclude: tuple[str, ...] = (), again: Any = None) -> Any:
        """Return the request and the name of its replica."""
        self.count += 1
        ask = Ask(method="POST", target="/", prompt=prompt, max_new_tokens=tokens, exclude=exclude)
        request = again or SimpleNamespace(
            args=[ask], metadata=SimpleNamespace(internal_request_id=f"r{self.count}"), ask=ask
        )
        ((chosen,),) = await self.router.choose_replicas(self.replicas, request)  # type: ignore[arg-type]
        return request, chosen.replica_id.unique_id

    def end(self, request: Any, name: str, num_new: int = 10) -> None:
        request.ask.progress.advance(num_new)
        replica = ReplicaID(unique_id=name, deployment_id=DEPLOYMENT)
        self.router.on_request_routed(request, replica, None)
        self.router.on_request_completed(replica, request.metadata.internal_request_id)

    def outstanding(self, name: str) -> float:
        return self.router._placement.outstanding(name)


def prompt(number: int) -> str:
    return f"{number}: " + "once upon a time " * 60


def test_a_conversation_stays_where_its_prefix_is_until_that_replica_has_too_much_to_do() -> None:
    async def work() -> None:
        on = Routing(*map(FakeReplica, "abc"))
        homes = {}
        for number in range(6):
            request, homes[number] = await on.choose(prompt(number))
            on.end(request, homes[number])
        assert len(set(homes.values())) > 1
        for number in range(6):
            request, name = await on.choose(prompt(number) + " and more")
            assert name == homes[number]
            on.end(request, name)
        piled = Counter([(await on.choose(prompt(0)))[1] for _ in range(30)])
        assert len(piled) == 3
        assert max(piled.values()) < 25

    asyncio.run(work())


def test_outstanding_tokens_return_to_zero_however_requests_end() -> None:
    async def work() -> None:
        on = Routing(*map(FakeReplica, "ab"))
        requests = [await on.choose(prompt(number)) for number in range(8)]
        assert on.outstanding("a") > 0
        assert on.outstanding("b") > 0
        before = on.outstanding(requests[0][1])
        requests[0][0].ask.progress.advance(1)
        await asyncio.sleep(0)  # the first token is told in the router's loop
        assert on.outstanding(requests[0][1]) < before
        for request, name in requests:
            on.end(request, name)
        request, _ = await on.choose(prompt(9))
        _, second = await on.choose(prompt(9), again=request)  # Serve asks again: the replica could not take it
        on.end(request, second)
        assert (on.outstanding("a"), on.outstanding("b")) == (0, 0)
        assert on.router._placed == {}

    asyncio.run(work())


def test_refused_dead_draining_and_busy_replicas_are_passed_over() -> None:
    async def work() -> None:
        on = Routing(*map(FakeReplica, "abc"))
        assert {(await on.choose(prompt(1), exclude=("a", "b")))[1] for _ in range(5)} == {"c"}
        on.router.on_replica_actor_died(ReplicaID(unique_id="c", deployment_id=DEPLOYMENT))
        assert {(await on.choose(prompt(n)))[1] for n in range(20)} == {"a", "b"}
        on.router.update_replicas([FakeReplica("a", up=0.0), FakeReplica("b", up=1.0)])  # type: ignore[list-item]
        assert {(await on.choose(prompt(n)))[1] for n in range(20)} == {"b"}
        fresh = Routing(FakeReplica("a", running=50.0), FakeReplica("b", running=1.0))
        assert {(await fresh.choose(prompt(n)))[1] for n in range(10)} == {"b"}  # others' requests count

    asyncio.run(work())


def test_a_request_that_no_replica_should_take_goes_to_any() -> None:
    async def work() -> None:
        on = Routing(*map(FakeReplica, "ab"))
        ask = Ask(method="POST", target="/", exclude=("a", "b"))
        request = SimpleNamespace(args=[ask], metadata=SimpleNamespace(internal_request_id="x"))
        assert await on.router.choose_replicas(on.replicas, request) == [on.replicas]  # type: ignore[arg-type]
        assert await on.router.choose_replicas(on.replicas, None) == [on.replicas]  # type: ignore[arg-type]

    asyncio.run(work())


def test_at_random_prompts_do_not_count() -> None:
    async def work() -> None:
        on = Routing(*map(FakeReplica, "abc"), at_random=True)
        found = Counter([(await on.choose(prompt(0)))[1] for _ in range(90)])
        assert min(found.values()) > 15

    asyncio.run(work())
