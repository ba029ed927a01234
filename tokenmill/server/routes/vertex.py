"""POST /vertex, and the path in AIP_PREDICT_ROUTE that Vertex AI names: many prompts, a list of texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, TypeVar

import msgspec

from tokenmill.errors import ValidationError
from tokenmill.misfit import misfit
from tokenmill.server import failures
from tokenmill.server.call import Call
from tokenmill.server.generation import GeneratedToken, Generation
from tokenmill.server.routes import texts
from tokenmill.server.routes.chat import prepare_chat
from tokenmill.server.routes.native import parameters_of
from tokenmill.server.schema.native import GenerateParameters
from tokenmill.server.schema.openai import ChatRequest
from tokenmill.server.schema.platforms import VertexInstance, VertexRequest, VertexResponse
from tokenmill.text.answer_reader import PLAIN, AnswerReader, whole_text
from tokenmill.text.prepare import Prepared
from tokenmill.text.router import fold
from tokenmill.text.tokenizer import Tokenizer

T = TypeVar("T")
_encode = msgspec.json.Encoder().encode


class EmptyError(ValidationError):
    """There are no instances; TGI has an error type for it."""

    error_type = "Input validation error"


class _Instance(NamedTuple):
    """One prepared instance. `text_of`: makes its prediction; `num_characters`: of its prompt."""

    prepared: Prepared
    reader: AnswerReader
    text_of: texts.TextOf
    num_characters: int


async def vertex_compatibility(call: Call) -> None:
    """Generate for each instance, a prompt or a chat."""
    body = await call.decode(VertexRequest)
    if not body.instances:
        raise EmptyError("Input validation error", "instances")
    texts.check_count(call, "instances", len(body.instances))
    made: list[_Instance] = []
    for i, instance in enumerate(body.instances):
        prepare = _plain if "inputs" in instance else _chat
        made.append(await prepare(call, instance, body.parameters, f"instances[{i}]"))
    answer = texts.Texts([one.text_of for one in made], lambda predictions: _encode(VertexResponse(predictions)))
    num_characters = sum(one.num_characters for one in made)
    await texts.answer(call, [one.prepared for one in made], num_characters, answer, [one.reader for one in made])


async def _plain(call: Call, instance: dict[str, Any], common: GenerateParameters | None, where: str) -> _Instance:
    body = await call.work(lambda: _converted(instance, VertexInstance, where))
    given = parameters_of(body.parameters if body.parameters is not None else common)
    if given.do_sample is None:  # TGI samples on this route
        given = msgspec.structs.replace(given, do_sample=True)
    call.take(1)
    prepared = await texts.prepare_text(call, body.inputs, given, where)
    prefix = body.inputs if given.return_full_text else ""
    return _Instance(prepared, PLAIN, texts.with_prompt(prefix), len(body.inputs))


async def _chat(call: Call, instance: dict[str, Any], common: GenerateParameters | None, where: str) -> _Instance:
    if "messages" not in instance:
        raise failures.BodyError(422, f"{where}: an instance must have `inputs` or `messages`", where)
    if common is not None:
        raise ValidationError("`parameters` hold for instances with `inputs` only", "parameters")
    body = await call.work(lambda: _converted(instance, ChatRequest, where))
    if body.stream:
        raise ValidationError(f"`stream` is not supported here. Given in {where}", "stream")
    if (body.n or 1) > 1:
        raise ValidationError(f"`n` must be 1 here. Given in {where}: {body.n}", "n")
    if body.logprobs:
        raise ValidationError(f"`logprobs` is not supported here: the answer is a text. Given in {where}", "logprobs")
    chat = await prepare_chat(call, msgspec.structs.replace(body, parallel_tool_calls=False))
    text_of = partial(_prediction, call.service.ready().model.tokenizer, bool(body.tools or body.functions))
    return _Instance(chat.prepared, chat.reader, text_of, chat.num_characters)


def _prediction(tokenizer: Tokenizer, has_tools: bool, generation: Generation, tokens: Sequence[GeneratedToken]) -> str:
    """Return a chat's prediction: its call as JSON, {"function": {"_name": …, its arguments}}, in the form of TGI's
    models; without a call, the whole generated text."""
    router = generation.router
    if router is None:
        return generation.text
    made = fold([token.read for token in tokens if token.read is not None])
    for found in made.calls if has_tools and router.complete_calls else ():
        with suppress(ValueError):  # of a call that was cut off
            arguments = json.loads(found.arguments)
            return json.dumps({"function": {"_name": found.name, **arguments}}, ensure_ascii=False)
    return whole_text(tokenizer, generation.prepared.ids_before, [token.id for token in tokens], router.stopped)


def _converted(instance: dict[str, Any], kind: type[T], where: str) -> T:
    try:
        return msgspec.convert(instance, kind)
    except msgspec.ValidationError:
        raise failures.BodyError(422, f"{where}: {misfit(instance, kind).sentence()}", where) from None
