"""Routes about the server: `/info`, `/health`, `/ping`, GET `/`, `/metrics`; and `/tokenize`, `/chat_tokenize`."""

from __future__ import annotations

from itertools import islice

import msgspec

from tokenmill.errors import ValidationError
from tokenmill.server.call import Call
from tokenmill.server.routes.chat import plan_chat
from tokenmill.server.schema.native import ChatTokenizeResponse, GenerateRequest, Info, SimpleToken
from tokenmill.server.schema.openai import ChatRequest
from tokenmill.text.options import Options
from tokenmill.text.tokenizer import Tokenizer

_PART = 10_000  # tokens
_encode = msgspec.json.Encoder().encode


async def health(call: Call) -> None:
    """200 without a body, or 503 with the phase."""
    call.service.check_health()
    await call.reply(200, b"", [])


async def info(call: Call) -> None:
    """TGI's `/info`."""
    model, limits, engine = call.service.ready()
    options = call.service.options
    body = Info(
        model_id=model.id,
        model_sha=model.revision or None,
        model_pipeline_tag=None,
        max_concurrent_requests=options.configured_concurrent_requests,
        max_best_of=limits.max_best_of,
        max_stop_sequences=limits.max_stop_sequences,
        max_input_tokens=limits.max_input_tokens,
        max_total_tokens=limits.max_total_tokens,
        validation_workers=options.validation_workers,
        max_client_batch_size=options.max_client_batch_size,
        router="text-generation-router",
        version=options.version,
        sha=None,
        docker_label=options.docker_label or None,
        model_dtype=engine.info.dtype,
        model_device_type=engine.info.device,
        max_batch_total_tokens=engine.capacity,
        max_input_length=limits.max_input_tokens,
        prefix_caching=engine.info.shares_prefixes,
        backend=engine.info.backend,
        weights=list(engine.info.weights),
    )
    await call.answer(_encode(body))


async def metrics(call: Call) -> None:
    """Metrics of all workers in Prometheus' text format."""
    text = call.service.metrics.text()
    await call.reply(200, text.encode(), [(b"content-type", b"text/plain; charset=utf-8")])


async def tokenize(call: Call) -> None:
    """Tokens of `inputs`, with the bytes of each; special tokens that are added have none."""
    body = await call.decode(GenerateRequest)
    model = call.service.ready().model
    if not body.inputs:
        raise ValidationError("`inputs` cannot be empty", "inputs")
    await call.answer(await call.service.in_thread(lambda: _tokens_of(model.tokenizer, body.inputs)))


async def get_chat_tokenize(call: Call) -> None:
    """The prompt of a chat, and its tokens: the input from which `/v1/chat/completions` would generate."""
    body = await call.decode(ChatRequest)
    model = call.service.ready().model
    text = (await plan_chat(call, body, Options(thinking_budget=body.thinking_budget))).prompt

    def work() -> bytes:
        tokens = _tokens_of(model.tokenizer, text, add_special_tokens=False) if text else b"[]"
        return _encode(ChatTokenizeResponse(msgspec.Raw(tokens), text))  # type: ignore[arg-type]  # `tokens` is JSON text

    await call.answer(await call.service.in_thread(work))


def _tokens_of(tokenizer: Tokenizer, text: str, add_special_tokens: bool = True) -> bytes:
    """Return the tokens of a text, as a JSON list. Encoded in parts, because other threads wait while one is
    encoded."""
    offsets = tokenizer.encode_with_offsets(text, add_special_tokens)
    parts = iter(lambda: _encode([SimpleToken(*offset) for offset in islice(offsets, _PART)])[1:-1], b"")
    return b"[" + b",".join(parts) + b"]"
