"""Logs requests that have ended, in the form of TGI's "Success" line, which users parse as an access log. Never logs
texts.

The line's fields are those of TGI's request span, by name and form; `tracing.py` puts the same fields on its spans.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from tokenmill.server.call import Call
from tokenmill.server.generation import Generation
from tokenmill.text.prepare import Prepared

log = logging.getLogger(__name__)

_HANDLERS = {
    "POST /": "compat_generate", "/v1/chat/completions": "chat_completions", "/v1/completions": "completions",
    "/vertex": "vertex_compatibility", "/invocations": "sagemaker_compatibility", "/info": "get_model_info",
    "/v1/models": "openai_get_model_info", "/ping": "health", "GET /": "health",
}  # fmt: skip

_PROBES = ("/health", "/ping", "/metrics", "/v2/health/live", "/v2/health/ready")


def handler_name(method: str, route: str) -> str:
    """Return TGI's name for the handler of a route, which is the name of its span."""
    name = _HANDLERS.get(route) or _HANDLERS.get(f"{method} {route}")
    return name or route.strip("/").replace("/", "_").replace("-", "_") or "health"


def succeeded(call: Call, generations: Sequence[Generation], copies: int) -> None:
    """Count and log each answered prompt; of `copies` the first."""
    for generation in generations[::copies]:
        call.service.requests.success(generation)
    if not log.isEnabledFor(logging.INFO):
        return
    name = handler_name(call.scope["method"], call.route)
    for generation in generations[::copies]:
        span = {"name": name, **fields(generation), "request_id": call.request_id}
        log.info("Success", extra={"span": span})


def refused(call: Call) -> None:
    """Log an error answer: where and which, not why, because the reason may repeat what the client sent.

    Probes of a server that is not ready are not logged.
    """
    if call.route in _PROBES or not log.isEnabledFor(logging.INFO):
        return
    name = handler_name(call.scope["method"], call.route)
    message = "The client left" if call.status == 499 else "Refused" if call.status < 500 else "Failed"
    log.info(message, extra={"span": {"name": name, "status": call.status, "request_id": call.request_id}})


def fields(generation: Generation) -> dict[str, str]:
    """Return the parameters of one generation and the durations of its parts."""
    times, prepared = generation.timings, generation.prepared
    inference = times.last - times.admitted
    return {
        "parameters": parameters(prepared),
        "total_time": duration(times.last - times.arrived),
        "validation_time": duration(times.submitted - times.arrived),
        "queue_time": duration(times.admitted - times.submitted),
        "inference_time": duration(inference),
        "time_per_token": duration(inference / max(generation.num_generated, 1)),
        "seed": _some(prepared.seed, None),
    }


def parameters(prepared: Prepared) -> str:
    """Return the parameters of a generation after all defaults, in the form of TGI's log. Stop strings are masked."""
    sampling, stopping = prepared.sampling, prepared.stopping
    values = {
        "temperature": _some(sampling.temperature, 0.0),
        "repetition_penalty": _some(sampling.repetition_penalty, 1.0),
        "frequency_penalty": _some(sampling.frequency_penalty, 0.0),
        "top_k": _some(sampling.top_k, 0),
        "top_p": _some(sampling.top_p, 1.0),
        "typical_p": _some(sampling.typical_p, 1.0),
        "do_sample": "false" if sampling.greedy else "true",
        "max_new_tokens": f"Some({stopping.max_new_tokens})",
        "stop": "[" + ", ".join(['"***"'] * len(prepared.stop)) + "]",
        "watermark": "true" if sampling.watermark_gamma > 0 else "false",
        "decoder_input_details": "true" if sampling.prompt_logprobs >= 0 else "false",
        "seed": _some(prepared.seed, None),
        "top_n_tokens": _some(max(sampling.logprobs, 0), 0),
    }
    return "GenerateParameters { " + ", ".join(f"{name}: {value}" for name, value in values.items()) + " }"


def _some(value: float | None, off: float | None) -> str:
    """Return a value as Rust prints an optional one. `off`: the value that means "not set"."""
    return "None" if value is None or value == off else f"Some({value})"


def duration(seconds: float) -> str:
    """Return seconds as Rust prints them, to the nanosecond: 1.25s, 45.6ms, 12.3µs, 80ns."""
    nanoseconds = max(round(seconds * 1e9), 0)
    for unit, scale, digits in (("s", 10**9, 9), ("ms", 10**6, 6), ("µs", 10**3, 3)):
        if nanoseconds >= scale:
            whole, rest = divmod(nanoseconds, scale)
            return f"{whole}.{rest:0{digits}d}".rstrip("0").rstrip(".") + unit
    return f"{nanoseconds}ns"
