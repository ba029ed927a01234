"""The ranks of a whole engine as threads, with the messages of rank 0 in queues."""

from __future__ import annotations

import threading
from queue import Queue
from typing import Any

from oracle import ListLink, prompt_details_of

from tokenmill.engine.engine import Engine
from tokenmill.engine.extended import Extended
from tokenmill.engine.gated import Gated
from tokenmill.runtime.assembly import Assembled
from tokenmill.wire.messages import Output, Stats, ToEngine


class Forward:
    """Link of rank 0 that copies the messages to the queues of the other ranks."""

    def __init__(self, inner: Any, queues: list[Queue[Any]]) -> None:
        self.inner, self.queues = inner, queues

    def receive(self, block: bool, plan: bytes = b"") -> Any:
        messages = list(self.inner.receive(block, plan))
        for queue in self.queues:
            queue.put((messages, plan))
        return messages

    def send(self, outputs: list[Output], stats: Stats) -> None:
        self.inner.send(outputs, stats)


class Ended(Exception):
    """Rank 0 has ended."""


class Behind:
    """Link of another rank, which compares its plans with those of rank 0."""

    def __init__(self, queue: Queue[Any]) -> None:
        self.queue = queue

    def receive(self, block: bool, plan: bytes = b"") -> Any:
        found = self.queue.get(timeout=20)
        if found is None:
            raise Ended
        assert found[1] == plan, "the ranks plan different steps"
        return found[0]

    def send(self, outputs: list[Output], stats: Stats) -> None:
        pass


class Threads:
    """The engines of all ranks, on threads but rank 0's, which is the caller's. `script`: messages by step."""

    def __init__(self, parts: list[Assembled], script: list[list[ToEngine]]) -> None:
        self.link, constraints = ListLink(script), parts[0].constraints
        assert constraints is not None
        self.gated = Gated(self.link, [constraints])
        self.queues: list[Queue[Any]] = [Queue() for _ in parts[1:]]
        links = [Forward(Extended(self.gated, constraints), self.queues), *map(Behind, self.queues)]
        self.first, *others = (
            Engine(part.scheduler, part.executor, link, compare_plans=True)
            for part, link in zip(parts, links, strict=True)
        )
        self.errors: list[BaseException] = []
        self.threads = [threading.Thread(target=self.follow, args=(engine,), daemon=True) for engine in others]

    def follow(self, engine: Engine[Any]) -> None:
        try:
            while True:
                engine.step()
        except Ended:
            pass
        except BaseException as error:  # noqa: BLE001  the main thread raises it
            self.errors.append(error)

    def run(self) -> dict[int, list[Output]]:
        """Run until every request has ended, and return the outputs by request."""
        for thread in self.threads:
            thread.start()
        try:
            while self.link.script or not self.first.idle or self.gated.holds:
                self.first.step()
        finally:
            for queue in self.queues:
                queue.put(None)
        for thread in self.threads:
            thread.join(20)
        assert not self.errors, self.errors
        self.gated.close()
        return self.link.outputs


def told(outputs: list[Output]) -> Any:
    """Return all that a client gets of a request."""
    tokens = [t for o in outputs for t in o.token_ids]
    details = [d for o in outputs for d in o.details]
    return tokens, outputs[-1].finish_reason, details, prompt_details_of(outputs)
