"""Service: the parts of an HTTP worker that handlers share.

One per worker, made by `worker.py`, for the event loop only. The port is open before the model is loaded; requests are
refused until then, with the phase of the start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

import msgspec

from tokenmill.errors import NotReady
from tokenmill.server.client import EngineClient
from tokenmill.server.engine_status import Engine, EngineStatus
from tokenmill.server.metrics import Metrics
from tokenmill.server.options import ServiceOptions
from tokenmill.server.peers import Peers
from tokenmill.server.permits import Permits
from tokenmill.server.request_metrics import RequestMetrics
from tokenmill.text.options import Dialect, Options, RequestLimits
from tokenmill.text.prepare import Prepared, prepare
from tokenmill.text.tokenizer import Tokenizer

_SHORT_PROMPT = 2000
"""Characters of a prompt that is encoded at once: handing it to a thread and back would take longer."""

T = TypeVar("T")


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """The served model: its name, and the tokenizer with the chat template."""

    id: str
    revision: str
    tokenizer: Tokenizer
    created: int  # Unix seconds
    digest: str = ""  # see `digests.model_digest`


class Ready(NamedTuple):
    """The parts of a service that serves requests now."""

    model: Model
    limits: RequestLimits
    engine: Engine


class Service:
    """The parts of one worker. `run_dir`: holds the metrics of all workers; `addresses`: of the engines' sockets.

    `model`: None until it is loaded. `draining`: the server shuts down and takes no more requests.
    """

    def __init__(self, options: ServiceOptions, *, addresses: Sequence[str], run_dir: str, index: int = 0) -> None:
        self.options = options
        self.metrics = Metrics(run_dir, index, len(addresses))
        self.requests = RequestMetrics(self.metrics)
        self.permits = Permits(options.max_concurrent_requests, self.metrics)
        self.status = EngineStatus(options, self.metrics)
        several = options.num_workers > 1 and len(addresses) > 1
        peers = partial(Peers, run_dir, index, options.num_workers) if several else None
        self.client = EngineClient(addresses, self.status, peers=peers)
        self.model: Model | None = None
        self.draining = False
        self._threads = ThreadPoolExecutor(options.validation_workers, thread_name_prefix="encode")

    def ready(self) -> Ready:
        """Return the model, the limits and the engine. Raises NotReady with the phase."""
        if self.draining:
            raise NotReady("the server is shutting down")
        engine = self.status.engine
        if self.model is None or engine is None or self.client.info is None:
            raise NotReady(self.status.phase)
        return Ready(self.model, engine.limits, engine)

    def check_health(self) -> None:
        """Raise NotReady unless a request would be served now."""
        self.ready()
        if not self.client.healthy:
            raise NotReady("unhealthy: the engine does not answer")

    async def encode(
        self,
        prompt: str | list[int],
        options: Options,
        dialect: Dialect,
        *,
        stream: bool,
        add_special_tokens: bool = True,
    ) -> Prepared:
        """Check options and encode the prompt, a long one in a thread. Raises ValidationError, NotReady."""
        model, limits, _ = self.ready()

        def work() -> Prepared:
            return prepare(
                prompt, options, limits, model.tokenizer,
                add_special_tokens=add_special_tokens, dialect=dialect, stream=stream,
            )  # fmt: skip

        if len(prompt) <= _SHORT_PROMPT and not isinstance(options.grammar, dict):  # whose schema may be long
            return work()
        return await self.in_thread(work)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run `work` in one of the encoding threads. It must not touch objects of the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Stop the threads and close the connection. Idempotent."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.client.close()
