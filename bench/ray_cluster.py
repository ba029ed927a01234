"""Deployments on a real Ray cluster of several nodes on this host: scaling, failures, updates, routing.

    python -m bench.ray_cluster                         everything, as a table; a few minutes
    python -m bench.ray_cluster --only kill,update

Needs `pip install 'tokenmill[ray]'`. Nodes are Ray's own (`ray.cluster_utils.Cluster`), with CPUs that need not exist.
The embedded model answers where its text counts (kill, node), the mock engine where it does not. Exit code 1 if a
figure misses its target.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import aiohttp

from tokenmill.bench.load import percentile

APP = "tokenmill"
MOCK = {"mock": True, "cpu_threads": 1, "mock_step_ms": 20.0, "max_batch_size": 4}
REAL = {"cpu_threads": 1, "max_total_tokens": 512}
WORDS = "time river stone light garden paper silent orange winter number summer bridge cloud letter".split()


class Row(NamedTuple):
    """One line of the table."""

    name: str
    figures: str
    good: bool


@dataclass
class Outcome:
    """One stream: its text, whether it ended well, and the seconds to its first event and in all."""

    text: str = ""
    error: str = ""
    first_s: float = 0.0
    took_s: float = 0.0
    cached: int = 0
    prompt: int = 0


async def stream(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Outcome:
    """Ask for a completion or a chat as a stream, and read it to its end."""
    route = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    outcome, begun, ended = Outcome(), time.perf_counter(), False
    common = {"model": "tgi", "temperature": 0, "stream": True, "ignore_eos": True}
    body = {**common, "stream_options": {"include_usage": True}, **body}
    try:
        async with session.post(url + route, json=body) as answer:
            if answer.status != 200:
                return Outcome(error=f"status {answer.status}: {(await answer.text())[:200]}")
            async for line in answer.content:
                if not line.startswith(b"data: "):
                    continue
                outcome.first_s = outcome.first_s or time.perf_counter() - begun
                ended = line.startswith(b"data: [DONE]")
                if not ended:
                    take(outcome, json.loads(line[6:]))
    except (aiohttp.ClientError, OSError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.took_s = time.perf_counter() - begun
    outcome.error = outcome.error or ("" if ended else "the stream broke off")
    return outcome


def take(outcome: Outcome, event: dict[str, Any]) -> None:
    """Add one event to an outcome."""
    if "error" in event:
        outcome.error = str(event["error"])
    for choice in event.get("choices", ()):
        outcome.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
    if event.get("usage"):
        outcome.prompt = event["usage"]["prompt_tokens"]
        outcome.cached = event["usage"]["prompt_tokens_details"]["cached_tokens"]


def session() -> aiohttp.ClientSession:
    """Return a client for any number of connections."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=120))


async def streams(url: str, bodies: list[dict[str, Any]]) -> list[Outcome]:
    """Ask for all of `bodies` at once."""
    async with session() as client:
        return list(await asyncio.gather(*(stream(client, url, body) for body in bodies)))


@dataclass
class Crowd:
    """Clients that ask again and again, in a thread of their own, until the block ends."""

    url: str
    num_clients: int
    max_tokens: int = 40
    outcomes: list[Outcome] = field(default_factory=list)

    def __enter__(self) -> Crowd:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    async def _run(self) -> None:
        async with session() as client:
            await asyncio.gather(*(self._client(client, number) for number in range(self.num_clients)))

    async def _client(self, client: aiohttp.ClientSession, number: int) -> None:
        numbers = random.Random(number)
        while not self._stop.is_set():
            prompt = " ".join(numbers.choices(WORDS, k=20))
            self.outcomes.append(await stream(client, self.url, {"prompt": prompt, "max_tokens": self.max_tokens}))

    @property
    def failures(self) -> list[str]:
        """Errors of the streams so far."""
        return [outcome.error for outcome in self.outcomes if outcome.error]


class Deployed:
    """A Ray cluster with Serve, and applications on it one after another."""

    def __init__(self, num_nodes: int = 3, cpus: int = 8) -> None:
        import ray
        from ray import serve
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus})
        self.nodes = [self.cluster.add_node(num_cpus=cpus) for _ in range(num_nodes - 1)]
        ray.init(address=self.cluster.address, log_to_driver=bool(os.environ.get("VERBOSE")))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        self.url = f"http://127.0.0.1:{port}"

    def run(self, *models: dict[str, Any]) -> None:
        """Deploy models, or update the running application to them; wait until it runs."""
        from ray import serve

        from tokenmill.deploy.app import build

        serve.run(build({"models": list(models)}), name=APP)

    def replicas(self, model: str = "m") -> list[str]:
        """Return the names of the running replicas of a model."""
        from ray import serve
        from ray.serve.schema import ReplicaState

        details = serve.context._get_global_client().get_serve_details()["applications"][APP]["deployments"][model]
        return [one["replica_id"] for one in details["replicas"] if one["state"] == ReplicaState.RUNNING]

    def kill(self, replica: str, model: str = "m") -> None:
        """Kill the actor of a replica, as a crash would."""
        import ray

        actor = ray.get_actor(f"SERVE_REPLICA::{APP}#{model}#{replica}", namespace="serve")
        ray.kill(actor, no_restart=True)

    def continued(self) -> int:
        """Return the number of streams that have gone on at another replica."""
        return int(self.ingress().num_continued.remote().result())

    def ingress(self) -> Any:
        """Return the handle of the ingress."""
        from ray import serve

        return serve.get_app_handle(APP)

    def close(self) -> None:
        """End everything."""
        import ray
        from ray import serve

        serve.shutdown()
        ray.shutdown()
        self.cluster.shutdown()


@contextlib.contextmanager
def deployed(num_nodes: int = 3) -> Iterator[Deployed]:
    """Run a cluster for the duration of the block."""
    one = Deployed(num_nodes)
    try:
        yield one
    finally:
        one.close()


def until(condition: Callable[[], bool], timeout_s: float) -> float:
    """Wait until `condition()` is true; return the seconds, or infinity."""
    begun = time.monotonic()
    while time.monotonic() - begun < timeout_s:
        if condition():
            return time.monotonic() - begun
        time.sleep(0.25)
    return float("inf")


def scale(on: Deployed) -> list[Row]:
    """1 -> 3 -> 1 replicas under load."""
    scaling = {"target_queue": 1.0, "target_ttft_s": 0.5, "up_after_s": 1.0, "down_after_s": 3.0, "look_back_s": 11.0}
    on.run({"name": "m", "options": MOCK, "min_replicas": 1, "max_replicas": 3, "scaling": scaling})
    before = len(on.replicas())
    with Crowd(on.url, 16) as crowd:
        up_s = until(lambda: len(on.replicas()) == 3, 60)
        time.sleep(3)
        took = [outcome.first_s for outcome in crowd.outcomes[-16:]]
    down_s = until(lambda: len(on.replicas()) == 1, 60)
    figures = (
        f"{before} -> 3 replicas after {up_s:.1f} s of load, 1 again {down_s:.1f} s after it; {len(crowd.outcomes)} "
        f"streams, {len(crowd.failures)} failed; time to first event at 3: p50 {percentile(took, 0.5):.2f} s"
    )
    return [Row("scale", figures, max(up_s, down_s) < 60 and before == 1 and not crowd.failures)]


def bodies(count: int, max_tokens: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return requests with different prompts."""
    numbers = random.Random(seed)
    prompts = [f"Write a story about {' and '.join(numbers.sample(WORDS, 3))}." for _ in range(count)]
    return [{"prompt": prompt, "max_tokens": max_tokens} for prompt in prompts]


def broken(on: Deployed, name: str, harm: Callable[[], None], count: int = 8) -> Row:
    """Compare streams of which some lose their replica with the same ones undisturbed."""
    asked = bodies(count, 160)
    before = on.continued()
    whole = asyncio.run(streams(on.url, asked))
    longest = max(one.took_s for one in whole)
    timer = threading.Timer(longest / 3, harm)
    timer.start()
    again = asyncio.run(streams(on.url, asked))
    timer.join()
    same = sum(a.text == b.text and not b.error for a, b in zip(whole, again, strict=True))
    clear = sum(bool(one.error) and "broke off" not in one.error for one in again)
    moved, last_s = on.continued() - before, max(one.took_s for one in again)
    figures = (
        f"{moved} of {count} streams went on elsewhere; {same} have the text of an undisturbed run, {clear} a clear "
        f"error, {count - same - clear} otherwise; longest {longest:.1f} s, disturbed {last_s:.1f} s"
    )
    return Row(name, figures, moved > 0 and same == count)


def kill(on: Deployed) -> list[Row]:
    """Streams of a killed replica go on elsewhere."""
    on.run({"name": "m", "options": REAL, "min_replicas": 2})
    killed = on.replicas()[0]
    row = broken(on, "kill a replica", lambda: on.kill(killed))
    healed = until(lambda: killed not in (now := on.replicas()) and len(now) == 2, 90)
    return [row, Row("heal", f"2 replicas again after {healed:.1f} s", healed < 90)]


def node(on: Deployed) -> list[Row]:
    """Streams of a node that is lost go on elsewhere."""
    on.run({"name": "m", "options": REAL, "min_replicas": 3, "cpus": 5})  # one replica a node
    lost = on.nodes.pop()
    row = broken(on, "lose a node", lambda: on.cluster.remove_node(lost, allow_graceful=False))
    on.nodes.append(on.cluster.add_node(num_cpus=8))
    return [row]


def update(on: Deployed, longest: int = 1500) -> list[Row]:
    """A rolling update under load. `longest`: tokens of a stream that outlasts the update."""
    model = {"name": "m", "options": {**MOCK, "mock_text": "old "}, "min_replicas": 2}
    on.run(model)
    with Crowd(on.url, 6, max_tokens=30) as crowd, Crowd(on.url, 1, max_tokens=longest) as long:
        time.sleep(2)
        begun = time.monotonic()
        on.run({**model, "options": {**MOCK, "mock_text": "new "}})
        took_s = time.monotonic() - begun
        until(lambda: all("new" in outcome.text for outcome in crowd.outcomes[-6:]), 60)
    whole = long.outcomes[0]
    new = sum("new" in outcome.text for outcome in crowd.outcomes)
    mixed = sum("new" in outcome.text and "old" in outcome.text for outcome in crowd.outcomes)
    slowest = max(outcome.first_s for outcome in crowd.outcomes)
    figures = (
        f"{len(crowd.outcomes)} streams during {took_s:.1f} s, {new} by the new version, {len(crowd.failures)} failed, "
        f"{mixed} of both; one of {whole.took_s:.0f} s {whole.error or 'was complete'}; slowest first event "
        f"{slowest:.2f} s{''.join('; ' + one for one in crowd.failures[:1])}"
    )
    return [Row("rolling update", figures, new > 0 and not crowd.failures and not mixed and not long.failures)]


async def conversations(url: str, num_sessions: int, num_turns: int) -> tuple[int, int]:
    """Hold many conversations of several turns, interleaved; return cached and all tokens of prompts."""
    numbers = random.Random(1)
    cached = total = 0
    chats = [
        [{"role": "system", "content": f"{i}: " + " ".join(numbers.choices(WORDS, k=300))}] for i in range(num_sessions)
    ]
    async with session() as client:
        for turn in range(num_turns):
            for chat in chats:
                chat.append({"role": "user", "content": f"{turn}: " + " ".join(numbers.choices(WORDS, k=20))})
            answers = await asyncio.gather(*(stream(client, url, {"messages": c, "max_tokens": 8}) for c in chats))
            for chat, answer in zip(chats, answers, strict=True):
                assert not answer.error, answer.error
                chat.append({"role": "assistant", "content": answer.text})
                cached, total = cached + answer.cached, total + answer.prompt
    return cached, total


def prefix(on: Deployed) -> list[Row]:
    """Cached tokens of a multi-turn workload, and the cost of choosing a replica."""
    hits: dict[str, float] = {}
    times: list[tuple[float, float]] = []
    for routing in ("random", "prefix"):
        options = {**MOCK, "mock_step_ms": 2.0, "max_batch_size": 32}
        on.run({"name": "m", "options": options, "min_replicas": 4, "routing": routing})
        until(lambda: len(on.replicas()) == 4, 30)
        cached, total = asyncio.run(conversations(on.url, 24, 3))
        hits[routing] = cached / total
    asyncio.run(conversations(on.url, 24, 12))
    times = on.ingress().routing_times.remote().result()
    ratio = hits["prefix"] / hits["random"] if hits["random"] else float("inf")
    wall, cpu = ([1e3 * one for one in column] for column in zip(*times, strict=True))
    return [
        Row("prefix hits", f"{hits['prefix']:.1%} of prompt tokens, at random {hits['random']:.1%}: {ratio:.1f} x",
            ratio >= 2),
        Row("cost of routing", f"CPU time p50 {percentile(cpu, 0.5):.2f} ms, p99 {percentile(cpu, 0.99):.2f} ms; wall "
            f"time p50 {percentile(wall, 0.5):.2f} ms, p99 {percentile(wall, 0.99):.2f} ms, beside the replicas on the "
            f"same cores; {len(times)} requests", percentile(cpu, 0.99) <= 2),
    ]  # fmt: skip


SCENARIOS: dict[str, Callable[[Deployed], list[Row]]] = {
    "scale": scale, "kill": kill, "node": node, "update": update, "prefix": prefix,
}  # fmt: skip


def main() -> int:
    """Run the scenarios and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SCENARIOS), help=f"of {', '.join(SCENARIOS)}")
    parser.add_argument("--nodes", type=int, default=3)
    given = parser.parse_args()
    rows: list[Row] = []
    with deployed(given.nodes) as on:
        for name in given.only.split(","):
            rows += SCENARIOS[name](on)
            print(f"{rows[-1].name}: {rows[-1].figures}", file=sys.stderr, flush=True)
    print(f"| {given.nodes} nodes | | |\n|---|---|---|")
    for row in rows:
        print(f"| {row.name} | {row.figures} | {'ok' if row.good else 'MISSED'} |")
    return 0 if all(row.good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
