"""POST /v1/chat/completions: decode, plan, prepare, answer. The meaning of a chat's fields is in `text/chat.py`."""

from __future__ import annotations

from typing import Any, NamedTuple

from tokenmill.errors import ValidationError
from tokenmill.server import answering, receipt
from tokenmill.server.call import Call
from tokenmill.server.routes.chat_answer import ChatAnswer
from tokenmill.server.routes.openai import Envelope, check_common, guided_fields, options_of
from tokenmill.server.schema.openai import ChatRequest
from tokenmill.text.answer_reader import AnswerReader
from tokenmill.text.chat import Chat, ChatModel, ChatPlan, plan
from tokenmill.text.limits import not_supported
from tokenmill.text.options import Options
from tokenmill.text.prepare import Prepared

_CHAT_FIELDS = tuple(name for name in Chat.__struct_fields__ if name not in ("options", "guided"))

_RETENTIONS = (None, "in_memory", "in-memory")
_TIERS = (None, "auto", "default", "flex", "scale", "priority")
_NOT_IN_THIS_RELEASE = "it is not in this release"
_UNSERVED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("modalities", (None, [], ["text"]), "only text is generated"),
    ("audio", (None,), "only text is generated"),
    ("prediction", (None,), _NOT_IN_THIS_RELEASE),
    ("web_search_options", (None,), _NOT_IN_THIS_RELEASE),
    ("store", (None, False), "answers are not kept"),
    ("service_tier", _TIERS, "OpenAI has no such tier; leave it out or send 'auto'"),
    ("prompt_cache_retention", _RETENTIONS, "the cache of prompts is in memory; send 'in_memory' or leave it out"),
)
"""Field, the values that have no effect, and the reason why others are refused."""


class PreparedChat(NamedTuple):
    """A chat whose permits are taken. `copies`: answers to generate; `num_characters`: of its prompt."""

    prepared: Prepared
    reader: AnswerReader
    copies: int
    num_characters: int


async def chat_completions(call: Call) -> None:
    """Decode, plan, prepare, answer."""
    await answer_chat(call, await call.decode(ChatRequest))


async def answer_chat(call: Call, body: ChatRequest) -> None:
    """Answer a chat that came by any route. The call's dialect should be "openai"."""
    chat = await prepare_chat(call, body)
    prompts = answering.Prompts(
        (chat.prepared,),
        chat.copies,
        keep_stop=bool(body.include_stop_str_in_output),
        num_characters=chat.num_characters,
        receipt=receipt.requested(call, body.receipt),
        readers=(chat.reader,),
    )
    envelope = Envelope(call, body, "chatcmpl-")
    answer = ChatAnswer(envelope, num_logprobs(body), chat.reader, older=bool(body.functions))
    await (answering.stream if body.stream else answering.fold)(call, prompts, answer)


async def prepare_chat(call: Call, body: ChatRequest) -> PreparedChat:
    """Check a chat, take its permits, plan it and encode its prompt. Raises RequestError."""
    copies = check_common(call, body)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    options = options_of(body, max_tokens=max_tokens, logprobs=num_logprobs(body))
    call.take(copies)
    prompt, options, reader = await plan_chat(call, body, options)
    try:
        prepared = await call.service.encode(
            prompt, options, "openai", stream=bool(body.stream), add_special_tokens=False
        )
    except ValidationError as error:
        error.param = _param(error, body)
        raise
    return PreparedChat(prepared, reader, copies, len(prompt))


async def plan_chat(call: Call, body: ChatRequest, options: Options) -> ChatPlan:
    """Return the plan of a chat, made in a thread if its body is large. Raises ValidationError, TemplateError."""
    check_fields(body)
    service = call.service
    model = ChatModel(
        service.ready().model.tokenizer,
        service.options.tool_call_parser,
        service.options.reasoning_parser,
        service.options.grammars,
    )
    return await call.work(lambda: plan(chat_of(body, options), model))


def chat_of(body: ChatRequest, options: Options) -> Chat:
    """Return the chat that a body describes."""
    return Chat(options=options, guided=guided_fields(body), **{name: getattr(body, name) for name in _CHAT_FIELDS})


def check_fields(body: ChatRequest) -> None:
    """Refuse fields that are not supported. Raises ValidationError that names the field."""
    for name, harmless, reason in _UNSERVED:
        if getattr(body, name) not in harmless:
            raise not_supported(name, reason)


def num_logprobs(body: ChatRequest) -> int | None:
    """Return the number of likeliest tokens to list at each position; None: no log-probabilities. Raises
    ValidationError."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ValidationError("Invalid 'top_logprobs': it needs `logprobs: true`", "top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def _param(error: ValidationError, body: ChatRequest) -> str | None:
    """Return the chat's name for the field that a rule about prompts and tokens names."""
    if error.param in (None, "prompt"):
        return "messages"
    if error.param == "max_tokens" and body.max_completion_tokens is not None:
        return "max_completion_tokens"
    return error.param
