"""POST /vertex, and the path that Vertex AI names in AIP_PREDICT_ROUTE: many prompts, a list of texts."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from tokenmill.errors import ValidationError
from tokenmill.server import failures
from tokenmill.server.call import Call
from tokenmill.server.routes import texts
from tokenmill.server.routes.chat import prepare_chat
from tokenmill.server.routes.chat_tools import tools_of
from tokenmill.server.routes.native import parameters_of
from tokenmill.server.schema.native import GenerateParameters
from tokenmill.server.schema.openai import ChatRequest
from tokenmill.server.schema.platforms import VertexInstance, VertexRequest, VertexResponse
from tokenmill.text.prepare import Prepared

T = TypeVar("T")
_encode = msgspec.json.Encoder().encode


class EmptyError(ValidationError):
    """There are no instances; TGI has a type of its own for it."""

    error_type = "Input validation error"


async def vertex_compatibility(call: Call) -> None:
    """Generate for each instance, a prompt or a chat."""
    body = await call.decode(VertexRequest)
    if not body.instances:
        raise EmptyError("Input validation error", "instances")
    texts.check_count(call, "instances", len(body.instances))
    prepared, prefixes, num_characters = [], [], 0
    for i, instance in enumerate(body.instances):
        if "inputs" in instance:
            one, prefix, size = await _plain(call, instance, body.parameters, f"instances[{i}]")
        else:
            one, prefix, size = await _chat(call, instance, body.parameters, f"instances[{i}]")
        prepared.append(one)
        prefixes.append(prefix)
        num_characters += size
    answer = texts.Texts(prefixes, lambda predictions: _encode(VertexResponse(predictions)))
    await texts.answer(call, prepared, num_characters, answer)


async def _plain(
    call: Call, instance: dict[str, Any], common: GenerateParameters | None, where: str
) -> tuple[Prepared, str, int]:
    """The prompt, what is put before its text, and its characters."""
    body = await call.work(lambda: _converted(instance, VertexInstance, where))
    given = parameters_of(body.parameters if body.parameters is not None else common)
    if given.do_sample is None:  # TGI samples on this route
        given = msgspec.structs.replace(given, do_sample=True)
    call.take(1)
    prepared = await texts.prepare_text(call, body.inputs, given, where)
    return prepared, body.inputs if given.return_full_text else "", len(body.inputs)


async def _chat(
    call: Call, instance: dict[str, Any], common: GenerateParameters | None, where: str
) -> tuple[Prepared, str, int]:
    """The same of a chat."""
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
    if tools_of(body) is not None:
        raise ValidationError(f"`tools` are not supported here: the answer is a text. Given in {where}", "tools")
    sequences = (await prepare_chat(call, body)).sequences
    return sequences.prompts[0], "", sequences.num_characters


def _converted(instance: dict[str, Any], kind: type[T], where: str) -> T:
    try:
        return msgspec.convert(instance, kind)
    except msgspec.ValidationError as error:
        raise failures.BodyError(422, f"{where}: {error}", where) from None
