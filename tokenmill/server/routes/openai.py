"""What chat and completions share: options, refusals by name, ids, usage, log-probabilities, the list of models."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

import msgspec

from tokenmill.errors import ValidationError
from tokenmill.server import failures, sse
from tokenmill.server.call import Call
from tokenmill.server.generation import GeneratedToken, Generation
from tokenmill.server.schema.openai import Model, ModelList, SamplingFields, StreamOptions, Usage
from tokenmill.text.prepare import Options
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.wire.messages import TokenDetails

FINISH = {"": None, "eos": "stop", "stop": "stop", "length": "length"}
_MAX_N = 128  # OpenAI's
_encode = msgspec.json.Encoder().encode


async def list_models(call: Call) -> None:
    """GET /v1/models: the one that is served."""
    await call.answer(_encode(ModelList("list", [_model(call)])))


async def retrieve_model(call: Call) -> None:
    """GET /v1/models/{id}: the served one under its name, else 404."""
    model = _model(call)
    if call.path_rest != model.id:
        raise failures.NotFound(f"The model {call.path_rest!r} does not exist; {model.id!r} is served")
    await call.answer(_encode(model))


def _model(call: Call) -> Model:
    model, _, _ = call.service.ready()
    return Model(model.id, "model", model.created, model.id)


def refuse(param: str, reason: str) -> ValidationError:
    """A field that would change the answer and cannot be honoured."""
    return ValidationError(f"`{param}` is not supported: {reason}", param)


def check_common(call: Call, body: SamplingFields, *, most_copies: int) -> int:
    """Refuse what is not served yet, by name; the number of choices a prompt. ValidationError, NotFound."""
    kind = (body.response_format or {}).get("type", "text")
    if kind != "text":
        raise refuse("response_format", f"{kind!r} constrains the answer by a grammar, which is not in this release")
    n = 1 if body.n is None else body.n
    most = min(_MAX_N, most_copies)
    if not 1 <= n <= most:
        raise ValidationError(f"Invalid 'n': it must be between 1 and {most}. Given: {n}", "n")
    if body.stream_options is not None and not body.stream:
        raise ValidationError("Invalid 'stream_options': it is only allowed with `stream: true`", "stream_options")
    if call.service.options.strict_model_name:
        served = call.service.ready()[0].id
        if body.model not in (None, "", "tgi", served):
            raise failures.NotFound(f"The model {body.model!r} does not exist; {served!r} is served")
    return n


def options_of(body: SamplingFields, *, max_tokens: int | None, logprobs: int | None) -> Options:
    """The fields that both APIs have, as options of a generation."""
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
    """What every object of one answer repeats: id, time, names; and the usage at its end."""

    def __init__(self, call: Call, body: SamplingFields, prefix: str) -> None:
        model, _, _ = call.service.ready()
        self.tokenizer: Tokenizer = model.tokenizer
        self.id = prefix + secrets.token_hex(12)
        self.created = int(time.time())
        self.model = body.model if body.model and body.model != "tgi" else model.id
        self.fingerprint = f"{call.service.options.version}-native"
        stream_options = body.stream_options or StreamOptions()
        self.include_usage = bool(stream_options.include_usage)

    def usage(self, generations: Sequence[Generation]) -> Usage:
        """Tokens of the whole call; a prompt counts once however many choices it has."""
        prompts = {g.prompt_index: g for g in generations}.values()
        prompt = sum(g.prepared.num_prompt for g in prompts)
        completion = sum(g.num_generated for g in generations)
        cached = sum(g.num_cached for g in prompts)
        return Usage(prompt, completion, prompt + completion, {"cached_tokens": cached})

    def top_texts(self, details: TokenDetails) -> list[tuple[int, str, float]]:
        """The likeliest tokens: id, text, log-probability; best first."""
        text_of = self.tokenizer.token_text
        return [(i, text_of(i), lp) for i, lp in zip(details.top_ids, details.top_logprobs, strict=True)]


def closing_events(usage: bytes | None) -> bytes:
    """The end of every OpenAI stream: the usage chunk if asked for, then `[DONE]`."""
    return (sse.event(usage) if usage is not None else b"") + sse.DONE


def logprob_of(token: GeneratedToken) -> float:
    """The token's own log-probability; 0.0 if the engine gave none."""
    return token.details.logprob if token.details else 0.0
