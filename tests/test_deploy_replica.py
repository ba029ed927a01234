"""A replica and the server that it starts, without Ray: relay, load, health, failures, end."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from support_server import TEXT, byte_model

pytest.importorskip("aiohttp")

from tokenmill.deploy.messages import Ask, Head, ReplicaLost
from tokenmill.deploy.plan import Model
from tokenmill.deploy.replica import Replica
from tokenmill.errors import StartError

OPTIONS = {"mock": True, "mock_text": TEXT, "mock_step_ms": 2.0, "max_total_tokens": 500, "log_level": "warn"}


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


def ask(text: str, tokens: int, path: str = "/generate") -> Ask:
    body = json.dumps({"inputs": text, "parameters": {"max_new_tokens": tokens, "ignore_eos": True}}).encode()
    return Ask(method="POST", target=path, headers=[(b"content-type", b"application/json")], body=body)


def test_a_replica_relays_reports_and_ends_with_its_server(tmp_path: Path) -> None:
    async def work() -> None:
        model = Model(options={**OPTIONS, "model_id": str(byte_model(tmp_path))})
        replica = Replica("r1", model, 1, "")
        await replica.start()
        await replica.check_health()
        head, body = await replica.fetch(ask("abc", 5))
        assert (head.replica, head.status) == ("r1", 200)
        assert json.loads(body) == {"generated_text": TEXT[:4]}  # a letter of two bytes
        names = {name.lower() for name, _ in head.headers}
        assert b"x-generated-tokens" in names
        assert not names & {b"date", b"server", b"connection", b"transfer-encoding"}
        parts = [part async for part in replica.send(ask("abc", 20, "/generate_stream"))]
        assert isinstance(parts[0], Head)
        assert len(parts) > 10  # as they come
        load = await replica.record_autoscaling_stats()
        assert (load["up"], load["running"], load["waiting"]) == (1, 0, 0)
        assert load["capacity"] > 500
        assert (await replica.info()).address == ""
        await end(replica)

    async def end(replica: Replica) -> None:
        running = [asyncio.ensure_future(collect(replica, 100)) for _ in range(2)]
        await asyncio.sleep(0.1)
        await replica.stop()  # lets them finish
        assert [len(text) for text in await asyncio.gather(*running)] == [100, 100]
        with pytest.raises(StartError, match="has ended"):
            await replica.check_health()
        with pytest.raises(ReplicaLost):
            await replica.fetch(ask("abc", 1))

    async def collect(replica: Replica, tokens: int) -> list[bytes]:
        parts = b"".join([p async for p in replica.send(ask("x", tokens, "/generate_stream")) if isinstance(p, bytes)])
        return [one for one in parts.split(b"\n\n") if one]

    run(work())


@pytest.mark.slow
def test_a_server_that_is_killed_breaks_its_streams_and_makes_the_replica_unhealthy(tmp_path: Path) -> None:
    async def work() -> None:
        model = Model(options={**OPTIONS, "model_id": str(byte_model(tmp_path))})
        replica = Replica("r1", model, 1, "")
        await replica.start()
        with pytest.raises(ReplicaLost, match="the connection to the server broke"):
            await killed(replica)
        while replica._server.running:
            await asyncio.sleep(0.01)
        with pytest.raises(StartError, match="exit code -9"):
            await replica.check_health()
        await replica.stop()

    async def killed(replica: Replica) -> None:
        async for part in replica.send(ask("abc", 400, "/generate_stream")):
            if isinstance(part, bytes):
                replica._server._process.send_signal(signal.SIGKILL)

    run(work())


@pytest.mark.slow
def test_a_server_that_cannot_start_gives_its_own_reason(tmp_path: Path) -> None:
    async def work() -> None:
        model = Model(options={"mock": True, "model_id": str(tmp_path / "none")})
        with pytest.raises(StartError, match="none"):
            await Replica("r1", model, 1, "").start()

    run(work())
