"""Replica: the actor that starts one server, watches it, and relays requests to it.

Ray Serve calls `check_health`, `record_routing_stats`, `record_autoscaling_stats` and, at the end, `__del__`, after the
requests that came through it have ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

import msgspec

from tokenmill.config import Settings
from tokenmill.deploy.load import Load, LoadMeter
from tokenmill.deploy.messages import Ask, Head, ReplicaInfo, ReplicaLost
from tokenmill.deploy.plan import Model, settings_of, words_and_environment
from tokenmill.deploy.relay import Relay
from tokenmill.deploy.server_process import ServerProcess
from tokenmill.listening import place

_START_POLL_S = 0.1
_LONGEST_STATS_AGE_S = 0.5
_HEALTH = Ask(method="GET", target="/health")
_METRICS = Ask(method="GET", target="/metrics")


class Replica:
    """One server of a model. `await start` comes first; all other calls are concurrent, on one event loop."""

    def __init__(self, name: str, model: Model, threads: int, host: str) -> None:
        """Start the server's process. `host`: address of this host for clients; "" if they come through Ray only."""
        words, environment = words_and_environment(model)
        settings = settings_of(model)
        if settings.cpu_threads is None:
            words.append(f"--cpu-threads={threads}")
        self._name, self._recovery_s = name, model.recovery_s
        self._drain_s = float(settings.graceful_termination_timeout)
        self._server = ServerProcess(words, {**Settings.environ(), **environment}, host or "127.0.0.1")
        self._address = f"http://{place(self._server.host, self._server.port)}"
        self._direct = bool(host)
        self._relay = Relay(self._address, name)
        self._meter = LoadMeter()
        self._load, self._load_at = Load(), 0.0
        self._healthy_at = time.monotonic()

    async def start(self) -> None:
        """Wait until the server is ready. Raises StartError with the server's own message if it ends before."""
        while await self._health() != 200:
            self._server.check()
            await asyncio.sleep(_START_POLL_S)
        self._healthy_at = time.monotonic()

    async def send(self, ask: Ask) -> AsyncGenerator[Head | bytes, None]:
        """Send a request to the server and yield its answer. See `messages.Replicas.send`."""
        async for part in self._relay.send(ask):
            yield part

    async def fetch(self, ask: Ask) -> tuple[Head, bytes]:
        """Send a request to the server and return its whole answer. Raises ReplicaLost."""
        return await self._relay.fetch(ask)

    async def info(self, ask: Ask | None = None) -> ReplicaInfo:
        """Return this replica's name and the address for clients beside the proxy. `ask` is for routing alone."""
        return ReplicaInfo(self._name, self._address if self._direct else "")

    async def check_health(self) -> None:
        """Raise StartError if the server has ended, or has been unhealthy for longer than it may be.

        `/health` answers 200 while the engine's heartbeats come. The supervisor restarts an engine by itself, for which
        it gets `recovery_s` seconds.
        """
        self._server.check()
        now = time.monotonic()
        if await self._health() == 200:
            self._healthy_at = now
        elif now - self._healthy_at > self._recovery_s:
            self._server.kill()
            self._server.check()

    async def record_routing_stats(self) -> dict[str, float]:
        """Return the load that routing reads."""
        return msgspec.structs.asdict(await self._measured())

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the load that autoscaling reads."""
        return msgspec.structs.asdict(await self._measured())

    async def stop(self) -> None:
        """End the server after the requests that came directly to it. Idempotent."""
        await self._server.stop(self._drain_s)
        await self._relay.close()

    async def _measured(self) -> Load:
        now = time.monotonic()
        if now - self._load_at > _LONGEST_STATS_AGE_S:
            self._load_at = now
            try:
                _, text = await self._relay.fetch(_METRICS)
                self._load = self._meter.read(text.decode(), now)
            except ReplicaLost:
                self._load = Load()
        return self._load

    async def _health(self) -> int:
        try:
            head, _ = await asyncio.wait_for(self._relay.fetch(_HEALTH), 5.0)
        except (ReplicaLost, TimeoutError):
            return 0
        return head.status
