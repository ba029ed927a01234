"""An HTTP worker: from the supervisor's settings to a serving socket. The composition root of this process.

The port is open from the start. The tokenizer is loaded when the model is on disk, and the engine is connected when it
listens. The supervisor ends the worker: by `Drain` and `Stop`, and also by its own death.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import socket
import sys
import time
from collections.abc import Coroutine, Iterator
from typing import Any

import msgspec
import uvicorn
import uvloop

from tokenmill import __version__
from tokenmill.config import Settings
from tokenmill.errors import NotReady, TemplateError
from tokenmill.freeze_gc import freeze_gc
from tokenmill.server.app import create_app
from tokenmill.server.digests import model_digest
from tokenmill.server.options import ServiceOptions
from tokenmill.server.protocol import BoundedProtocol
from tokenmill.server.service import Model, Service
from tokenmill.server.tracing import Tracer
from tokenmill.text.chat import check_parsers
from tokenmill.text.load import load_tokenizer
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.weights.source import ModelSource
from tokenmill.wire.control import ChildControl
from tokenmill.wire.messages import Drain, Drained, ModelReady, Phase, Ready, Stop

_KEEP_ALIVE_S = 75  # longer than the 60 s after which load balancers drop idle connections themselves

_SWITCH_S = 0.001
"""Time after which a thread that reads a large body yields to the event loop, which may wait that long several times
for an event."""

_COLLECT_AFTER = 20_000
"""New objects between two garbage collections. A large body makes hundreds of times Python's default, 700. All of them
are alive, and a collection visits each while all threads wait."""

_SHUTTING_DOWN = NotReady("the server is shutting down")
_LAST_WORDS_S = 1.0  # time to send errors for requests that did not finish

log = logging.getLogger(__name__)


def main(control: ChildControl) -> None:
    """Serve until the supervisor ends it. Raises StartError if the model's tokenizer cannot be read."""
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    sys.setswitchinterval(_SWITCH_S)
    gc.set_threshold(_COLLECT_AFTER)
    settings = Settings.from_dict(control.configure.settings)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(Worker(control, settings).run())


class _HttpServer(uvicorn.Server):
    """uvicorn without signal handlers, because the supervisor uses the control pipe."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals as they are."""
        yield


class Worker:
    """One HTTP worker. Used once: `run`."""

    def __init__(self, control: ChildControl, settings: Settings) -> None:
        self._control, self._settings = control, settings
        self._tasks: list[asyncio.Task[None]] = []
        self._error: BaseException | None = None

    async def run(self) -> None:
        """Serve until a message of the supervisor ends it."""
        configure, settings = self._control.configure, self._settings
        self._service = Service(
            options_of(settings),
            addresses=configure.engine_addresses,
            run_dir=configure.run_dir,
            index=configure.index,
        )
        tracer = None
        if settings.otlp_endpoint:
            tracer = Tracer.to(
                settings.otlp_endpoint, settings.otlp_service_name, sample_all=not settings.otel_traces_sampler
            )
        config = uvicorn.Config(
            create_app(self._service, tracer),
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            backlog=1024,
        )
        self._config, self._server = config, _HttpServer(config)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._control.fileno(), self._hear)
        self._hear()
        try:
            await self._server.serve([socket.socket(fileno=configure.listen_fd)])
        finally:
            loop.remove_reader(self._control.fileno())
            for task in self._tasks:
                task.cancel()
            self._service.close()
            if tracer is not None:
                await asyncio.to_thread(tracer.close)
        if self._error is not None:
            raise self._error

    def _hear(self) -> None:
        messages = self._control.poll()
        if messages is None:  # the supervisor, which would restart or stop this process, has died
            os._exit(1)
        for message in messages:
            if isinstance(message, ModelReady):
                self._begin(self._serve_model(msgspec.convert(message.source, ModelSource)))
            elif isinstance(message, Phase):
                self._set_phase(message)
            elif isinstance(message, Drain):
                self._service.draining = True
                self._begin(self._finish(message.timeout_s))
            elif isinstance(message, Stop):
                self._stop()

    def _set_phase(self, phase: Phase) -> None:
        if self._service.client.info is None and phase.name != "ready":
            self._service.status.phase = phase.name if phase.percent < 0 else f"{phase.name} {phase.percent} %"

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._error = error
            self._stop_now()

    async def _serve_model(self, source: ModelSource) -> None:
        """Load the tokenizer, then stay connected to the engine. Raises ModelError, Unsupported."""
        service = self._service
        check_parsers(service.options.tool_call_parser, service.options.reasoning_parser)
        tokenizer = await service.in_thread(lambda: _load(source))
        digest = await service.in_thread(lambda: model_digest(source))
        service.model = Model(
            id=source.model_id, revision=source.revision, tokenizer=tokenizer, created=int(time.time()), digest=digest
        )
        service.status.set_model(digest)
        freeze_gc()
        self._begin(self._tell_ready())
        await service.client.run()

    async def _tell_ready(self) -> None:
        await self._service.status.became_ready.wait()
        self._control.send(Ready())

    async def _finish(self, timeout_s: float) -> None:
        """Wait for the running requests, and until their clients have received what was sent, then report it to the
        supervisor.

        The port and connections stay open; requests that arrive meanwhile are refused with a time to retry.
        """
        log.info("Finishing %d running requests, for at most %g s", self._service.permits.in_flight, timeout_s)
        loop, state = asyncio.get_running_loop(), self._server.server_state
        loop.call_later(timeout_s, self._service.client.abort_all, _SHUTTING_DOWN)
        deadline = loop.time() + timeout_s + _LAST_WORDS_S
        if running := set(state.tasks):
            await asyncio.wait(running, timeout=deadline - loop.time())
        while loop.time() < deadline and any(map(_has_unsent, state.connections)):
            await asyncio.sleep(0.02)
        self._control.send(Drained())

    def _stop(self) -> None:
        self._service.draining = True
        self._service.client.abort_all(_SHUTTING_DOWN)
        self._config.timeout_graceful_shutdown = _LAST_WORDS_S  # type: ignore[assignment]  # may be a fraction
        self._server.should_exit = True

    def _stop_now(self) -> None:
        self._server.should_exit = self._server.force_exit = True


def _has_unsent(connection: Any) -> bool:
    return bool(connection.transport.get_write_buffer_size())


def _load(source: ModelSource) -> Tokenizer:
    """Return the model's tokenizer, with its chat template compiled. Raises ModelError, Unsupported."""
    tokenizer = load_tokenizer(source)
    if tokenizer.chat_template is not None:
        with contextlib.suppress(TemplateError):  # requests for which it fails get the error
            tokenizer.chat_template.render([{"role": "user", "content": "x"}])
    return tokenizer


def options_of(settings: Settings) -> ServiceOptions:
    """Return the settings that an HTTP worker uses. Permits are divided among the workers."""
    return ServiceOptions(
        version=__version__,
        max_concurrent_requests=-(-settings.max_concurrent_requests // settings.http_workers),
        num_workers=settings.http_workers,
        configured_concurrent_requests=settings.max_concurrent_requests,
        max_best_of=settings.max_best_of,
        max_stop_sequences=settings.max_stop_sequences,
        max_top_n_tokens=settings.max_top_n_tokens,
        max_client_batch_size=settings.max_client_batch_size,
        payload_limit=settings.payload_limit,
        validation_workers=settings.validation_workers,
        api_key=settings.api_key,
        cors_allow_origin=settings.cors_allow_origin,
        compute_type=settings.compute_type,
        protect_metrics=settings.protect_metrics,
        strict_model_name=settings.strict_model_name,
        docker_label=settings.docker_label,
        aip_predict_route=settings.aip_predict_route,
        aip_health_route=settings.aip_health_route,
        watermark_gamma=0.5 if settings.watermark_gamma is None else settings.watermark_gamma,
        watermark_delta=2.0 if settings.watermark_delta is None else settings.watermark_delta,
        grammars=not settings.disable_grammar_support,
        tool_call_parser=settings.tool_call_parser,
        reasoning_parser=settings.reasoning_parser,
        numerics=f"{settings.kv_cache_dtype} {settings.cpu_isa} {settings.cpu_threads} {settings.attention} "
        f"{settings.deterministic}",
    )
