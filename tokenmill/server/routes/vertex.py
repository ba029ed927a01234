"""POST /vertex, and the path that Vertex AI names in AIP_PREDICT_ROUTE: many prompts, a list of texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

from tokenmill.errors import ValidationError
from tokenmill.misfit import misfit
from tokenmill.server import failures
from tokenmill.server.call import Call
from tokenmill.server.generation import GeneratedToken, Generation
from tokenmill.server.routes import texts
from tokenmill.server.routes.chat import prepare_chat
from tokenmill.server.routes.chat_speech import Speech
from tokenmill.server.routes.native import parameters_of
from tokenmill.server.schema.native import GenerateParameters
from tokenmill.server.schema.openai import ChatRequest
from tokenmill.server.schema.platforms import VertexInstance, VertexRequest, VertexResponse
from tokenmill.text.detokenizer import Detokenizer
from tokenmill.text.prepare import Prepared
from tokenmill.text.router import fold
from tokenmill.text.tokenizer import Tokenizer

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
    prepared, tell, num_characters = [], [], 0
    for i, instance in enumerate(body.instances):
        if "inputs" in instance:
            one, told, size = await _plain(call, instance, body.parameters, f"instances[{i}]")
        else:
            one, told, size = await _chat(call, instance, body.parameters, f"instances[{i}]")
        prepared.append(one)
        tell.append(told)
        num_characters += size
    answer = texts.Texts(tell, lambda predictions: _encode(VertexResponse(predictions)))
    await texts.answer(call, prepared, num_characters, answer)


async def _plain(
    call: Call, instance: dict[str, Any], common: GenerateParameters | None, where: str
) -> tuple[Prepared, texts.Tell, int]:
    """The prompt, how its answer is told, and its characters."""
    body = await call.work(lambda: _converted(instance, VertexInstance, where))
    given = parameters_of(body.parameters if body.parameters is not None else common)
    if given.do_sample is None:  # TGI samples on this route
        given = msgspec.structs.replace(given, do_sample=True)
    call.take(1)
    prepared = await texts.prepare_text(call, body.inputs, given, where)
    return prepared, texts.behind(body.inputs if given.return_full_text else ""), len(body.inputs)


async def _chat(
    call: Call, instance: dict[str, Any], common: GenerateParameters | None, where: str
) -> tuple[Prepared, texts.Tell, int]:
    """The same of a chat. Where it has tools, a call is told as TGI's models wrote one."""
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
    sequences, speech = await prepare_chat(call, msgspec.structs.replace(body, parallel_tool_calls=False))
    has_tools = bool(body.tools or body.functions)
    told = _Called(call.service.ready()[0].tokenizer, speech).tell if has_tools else texts.behind("")
    return sequences.prompts[0], told, sequences.num_characters


class _Called:
    """Tells an answer that may be a call."""

    def __init__(self, tokenizer: Tokenizer, speech: Speech) -> None:
        self._tokenizer, self._speech = tokenizer, speech

    def tell(self, generation: Generation, tokens: Sequence[GeneratedToken]) -> str:
        """The call as JSON, {"function": {"_name": …, its arguments}}, alone; the text if there is none."""
        if self._speech.router is None:
            return generation.text
        one, router = generation.prepared, self._speech.router()
        marked = Detokenizer(
            self._tokenizer, one.stop, include_stop=True, min_tokens=one.stopping.min_new_tokens,
            prompt_ids=one.prompt_ids, shown_ids=self._speech.shown_ids,
        )  # fmt: skip
        deltas = [router.push(marked.push(token.id).text) for token in tokens]
        made = fold([*deltas, router.push(marked.finish()), router.finish()])
        for found in made.calls if router.complete_calls else ():
            with suppress(ValueError):  # one that broke off
                arguments = json.loads(found.arguments)
                return json.dumps({"function": {"_name": found.name, **arguments}}, ensure_ascii=False)
        return generation.text


def _converted(instance: dict[str, Any], kind: type[T], where: str) -> T:
    try:
        return msgspec.convert(instance, kind)
    except msgspec.ValidationError:
        raise failures.BodyError(422, f"{where}: {misfit(instance, kind).sentence()}", where) from None
