"""OpenTelemetry spans of requests, made after their end from the times that the answer needed anyway.

    POST /generate                      the HTTP request; a child of the caller's span if it sent `traceparent`
      generate                          TGI's handler span, with the fields of the "Success" line
        validate, queued, infer         of each sequence
          prefill, decode               of `infer`

The packages are the extra `tokenmill[otel]`, imported only where --otlp-endpoint is given. The engine has no tracer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tokenmill import __version__
from tokenmill.server import access
from tokenmill.server.call import Call
from tokenmill.server.generation import Generation

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_FLUSH_MS = 3000


class Tracer:
    """Sends spans to a collector by OTLP over gRPC, in batches, from a thread of its own."""

    def __init__(self, provider: Any) -> None:
        """Make a tracer. `provider`: a `TracerProvider` of OpenTelemetry's SDK, which is shut down with the tracer."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("tokenmill", __version__)
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, endpoint: str, service_name: str, *, sample_all: bool = True) -> Tracer:
        """Return a tracer for the collector at `endpoint` (http://host:4317: no TLS; https://…: TLS).

        `sample_all`: sample every request, as TGI does, whatever the caller's flags are; else the SDK's rule,
        OTEL_TRACES_SAMPLER.
        """
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON

        resource = Resource.create({"service.name": service_name, "service.version": __version__})
        provider = TracerProvider(ALWAYS_ON if sample_all else None, resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider)

    def record(self, call: Call) -> None:
        """Make the spans of a request that has just ended, with or without success."""
        from opentelemetry.trace import SpanKind

        clock = _Clock()
        method = call.scope["method"]
        parent = self._propagator.extract(_text_headers(call))
        span = self._tracer.start_span(
            f"{method} {call.route}".removesuffix(" other"), parent, SpanKind.SERVER, _http_attributes(call),
            start_time=clock.at(call.arrived),
        )  # fmt: skip
        handler = self._child(span, access.handler_name(method, call.route), clock.at(call.arrived))
        for generation in call.generations:
            if generation.timings.last:
                handler.set_attributes(access.fields(generation))
                break
        for generation in call.generations:
            self._generation(handler, generation, clock)
        for one in (handler, span):
            _set_status(one, call)
            one.end(clock.now)

    def close(self) -> None:
        """Send the remaining spans, for at most a few seconds, and stop. Blocks."""
        self._provider.force_flush(_FLUSH_MS)
        self._provider.shutdown()

    def _child(self, parent: Span, name: str, start: int) -> Span:
        from opentelemetry.trace import set_span_in_context

        made: Span = self._tracer.start_span(name, set_span_in_context(parent), start_time=start)
        return made

    def _generation(self, parent: Span, generation: Generation, clock: _Clock) -> None:
        for name, start, end in _parts(generation):
            span = self._child(parent, name, clock.at(start))
            if name == "infer":
                span.set_attributes(_counts(generation))
                times = generation.timings
                if times.first:
                    for part, begin, stop in (("prefill", start, times.first), ("decode", times.first, end)):
                        self._child(span, part, clock.at(begin)).end(clock.at(stop))
            span.end(clock.at(end) if end else clock.now)


class _Clock:
    """Converter of this process' monotonic seconds to nanoseconds since 1970."""

    def __init__(self) -> None:
        self.now = time.time_ns()
        self._offset = self.now - time.monotonic_ns()

    def at(self, seconds: float) -> int:
        return int(seconds * 1e9) + self._offset


def _parts(generation: Generation) -> Iterator[tuple[str, float, float]]:
    """Yield name, start and end (0.0: not ended) of the parts that have begun."""
    times = generation.timings
    yield "validate", times.arrived, times.submitted
    yield "queued", times.submitted, times.admitted
    if times.admitted:
        yield "infer", times.admitted, times.last


def _counts(generation: Generation) -> dict[str, Any]:
    return {
        "gen_ai.usage.input_tokens": generation.prepared.num_prompt,
        "gen_ai.usage.output_tokens": generation.num_generated,
        "cached_tokens": generation.num_cached,
        "finish_reason": generation.finish,
        "engine": generation.engine,
        "resumed": generation.num_moves,
    }


def _text_headers(call: Call) -> Mapping[str, str]:
    return {key.decode("latin-1"): value.decode("latin-1") for key, value in call.scope["headers"]
            if key in (b"traceparent", b"tracestate")}  # fmt: skip


def _http_attributes(call: Call) -> dict[str, Any]:
    """Return OpenTelemetry's attributes of an HTTP request, under the names of TGI's time and today's."""
    scope = call.scope
    return {
        "http.request.method": scope["method"],
        "http.method": scope["method"],
        "http.route": call.route,
        "url.path": scope["path"],
        "url.scheme": scope.get("scheme", "http"),
        "network.protocol.version": scope.get("http_version", "1.1"),
        "user_agent.original": call.header(b"user-agent").decode("latin-1"),
        "client.address": (scope.get("client") or ("",))[0],
        "request_id": call.request_id,
    }


def _set_status(span: Span, call: Call) -> None:
    from opentelemetry.trace import StatusCode

    span.set_attributes({"http.response.status_code": call.status, "http.status_code": call.status})
    if call.status >= 500 or call.status in (0, 424, 499):
        span.set_status(StatusCode.ERROR, "the client left" if call.status == 499 else None)
