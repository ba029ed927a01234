"""Parts shared by chat and completions: options, ids, usage, names of tokens, the list of models."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from tokenmill.errors import GrammarError, ValidationError
from tokenmill.server import failures
from tokenmill.server.call import Call
from tokenmill.server.generation import Generation
from tokenmill.server.schema.openai import (
    ChatRequest,
    Model,
    ModelList,
    SamplingFields,
    StreamOptions,
    Usage,
)
from tokenmill.text import guided
from tokenmill.text.limits import GRAMMAR_FIELDS, OPENAI_TABLE
from tokenmill.text.options import Options
from tokenmill.text.tokenizer import Tokenizer

FINISH = {"": None, "eos": "stop", "stop": "stop", "length": "length"}
_NO_CHOICES = b'"choices":[]'
_encode = msgspec.json.Encoder().encode


async def list_models(call: Call) -> None:
    """GET /v1/models: the served model."""
    await call.answer(_encode(ModelList("list", [_model(call)])))


async def retrieve_model(call: Call) -> None:
    """GET /v1/models/{id}: the served model under its name, else 404."""
    model = _model(call)
    if call.path_rest != model.id:
        raise failures.NotFound(f"The model {call.path_rest!r} does not exist; {model.id!r} is served", "model")
    await call.answer(_encode(model))


def _model(call: Call) -> Model:
    model = call.service.ready().model
    return Model(model.id, "model", model.created, model.id)


def check_common(call: Call, body: SamplingFields, *, num_prompts: int = 1) -> int:
    """Refuse values that are not supported, and return the number of choices for each prompt. Raises ValidationError,
    NotFound."""
    limits = call.service.ready().limits
    for limit in OPENAI_TABLE:
        limit.check(getattr(body, limit.name, None), limits, "openai")
    n = 1 if body.n is None else body.n
    most = max(call.service.options.max_concurrent_requests // num_prompts, 1)
    if n > most:
        raise ValidationError(f"Invalid 'n': it must be at most {most}, so that all can run. Given: {n}", "n")
    if body.stream_options is not None and not body.stream:
        raise ValidationError("Invalid 'stream_options': it is only allowed with `stream: true`", "stream_options")
    if call.service.options.strict_model_name:
        served = call.service.ready().model.id
        if body.model not in (None, "", "tgi", served):
            raise failures.NotFound(f"The model {body.model!r} does not exist; {served!r} is served", "model")
    return n


def guided_fields(body: SamplingFields) -> dict[str, Any]:
    """Return the fields of a body that ask for a grammar, by name."""
    return {name: value for name in GRAMMAR_FIELDS if (value := getattr(body, name)) is not None}


async def grammar_of(call: Call, body: SamplingFields) -> guided.RequestedGrammar | None:
    """Return the grammar that the body asks for in any field; None if the answer is free. Raises ValidationError,
    GrammarError."""
    given = guided_fields(body)
    if not given:
        return None
    requested = await call.work(lambda: guided.openai_grammar(given))
    if requested is not None and not call.service.ready().limits.grammars:
        raise GrammarError("grammar is not supported", requested.field)
    return requested


def options_of(body: SamplingFields, *, max_tokens: int | None, logprobs: int | None) -> Options:
    """Return the fields that both APIs have, as options of a generation."""
    return Options(
        max_new_tokens=max_tokens,
        min_new_tokens=body.min_tokens,
        do_sample=body.temperature != 0.0,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        typical_p=body.typical_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        seed=body.seed,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        ignore_eos=bool(body.ignore_eos),
        logit_bias=_logit_bias(body.logit_bias),
        logprobs=logprobs,
        raw_logprobs=True,
        truncate=body.truncate,
        thinking_budget=body.thinking_budget if isinstance(body, ChatRequest) else None,
    )


def _logit_bias(given: dict[str, float] | list[float] | None) -> dict[int, float] | None:
    if not given:
        return None
    if isinstance(given, list):
        raise ValidationError("Invalid 'logit_bias': it must be an object of token ids and biases", "logit_bias")
    bias = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise ValidationError(
                f"Invalid 'logit_bias': its keys must be token ids. Given: {key[:32]!r}", "logit_bias"
            )
        bias[int(key)] = value
    return bias


class Envelope:
    """Fields that all objects of one answer repeat: id, time, names; and the usage at its end."""

    def __init__(self, call: Call, body: SamplingFields, prefix: str) -> None:
        model, _, engine = call.service.ready()
        self.tokenizer: Tokenizer = model.tokenizer
        self.id = prefix + secrets.token_hex(12)
        self.created = int(time.time())
        self.model = body.model if body.model and body.model != "tgi" else model.id
        self.fingerprint = engine.fingerprint
        named_tier = isinstance(body, ChatRequest) and body.service_tier is not None
        self.service_tier: str | msgspec.UnsetType = "default" if named_tier else msgspec.UNSET
        stream_options = body.stream_options or StreamOptions()
        self.include_usage = bool(stream_options.include_usage)
        self._truncates = body.truncate is not None

    def usage(self, generations: Sequence[Generation]) -> Usage:
        """Return the tokens of the whole call. A prompt counts once, however many choices it has."""
        prompts = {g.prompt_index: g for g in reversed(generations)}.values()  # the first of each has computed it
        prompt = sum(g.prepared.num_prompt for g in prompts)
        completion = sum(g.num_generated for g in generations)
        details = {"cached_tokens": sum(g.num_cached for g in prompts)}
        if self._truncates:
            details["truncated_tokens"] = sum(g.prepared.num_truncated for g in prompts)
        return Usage(prompt, completion, prompt + completion, details)


def token_name(tokenizer: Tokenizer, token_id: int, prefix: str = "") -> str:
    """Return a token's name in a list of log-probabilities: its text, or its bytes in OpenAI's notation if it is not
    text."""
    text = tokenizer.token_text(token_id)
    if "\ufffd" not in text:
        return text
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in raw)


def frame_of(chunk: bytes) -> tuple[bytes, bytes]:
    """Return the parts of a stream's chunk before and behind its choice, from a chunk without one. So only the choice
    of a token has to be encoded."""
    head, _, tail = chunk.partition(_NO_CHOICES)  # a quote inside of a text is escaped and does not match
    return head + _NO_CHOICES[:-1], _NO_CHOICES[-1:] + tail
