"""Lines that tell users and their scripts that a server is ready."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from tokenmill.config import Settings
from tokenmill.listening import place
from tokenmill.wire.messages import EngineInfo

_log = logging.getLogger(__name__)


def readiness(infos: Sequence[EngineInfo], settings: Settings, took_s: float) -> list[str]:
    """Return the lines that name the model, its address, and a command to try it. `infos`: one per engine."""
    info = infos[0]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.hostname, settings.hostname)
    url = f"http://{place(host, settings.port)}"
    capacity = sum(info.capacity for info in infos)
    full = sum(info.capacity // max(info.max_total_tokens, 1) for info in infos)
    key = ' -H "Authorization: Bearer $API_KEY"' if settings.api_key else ""
    holds = "the KV cache holds" if len(infos) == 1 else "the KV caches hold"
    return [
        f"Ready in {took_s:.1f} s: {info.model_id} ({info.dtype}, {info.backend} on {info.device}"
        f"{_processes(len(infos), settings)}) at {url}; {holds} {capacity:,} tokens, "
        f"{full} request{'s' if full != 1 else ''} of the full {info.max_total_tokens:,} tokens.",
        f"  curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' \\\n"
        """    -d '{"temperature": 0, "messages": [{"role": "user", "content": "What is the capital of France?"}]}'""",
    ]


def _processes(engines: int, settings: Settings) -> str:
    """Return the number of engines and ranks, after a comma; "" for one process."""
    ranks = settings.ranks_per_engine
    stages = f" in {settings.pipeline_parallel_size} stages" if settings.pipeline_parallel_size > 1 else ""
    if engines > 1:
        return f", {engines} engines" + (f" of {ranks} ranks{stages}" if ranks > 1 else "")
    return f", {ranks} ranks{stages}" if ranks > 1 else ""


def announce(infos: Sequence[EngineInfo], settings: Settings) -> None:
    """Log the lines that scripts wait for in TGI's log. `infos`: one per engine."""
    info = infos[0]
    if info.revision:
        _log.info("Serving revision %s of model %s", info.revision, info.model_id)
    _log.info("Setting max batch total tokens to %d", sum(info.capacity for info in infos))
    if settings.max_total_tokens is None:
        _log.info("Maximum total tokens defaulted to %d", min(info.max_total_tokens for info in infos))
    if settings.max_input_tokens is None:
        _log.info("Maximum input tokens defaulted to %d", min(info.max_input_tokens for info in infos))
    _log.info("Connected")
