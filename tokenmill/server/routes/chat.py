"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import msgspec

from tokenmill.errors import TemplateError, ValidationError
from tokenmill.server import answering, receipt
from tokenmill.server.call import Call
from tokenmill.server.generation import GeneratedToken, Generation
from tokenmill.server.routes.chat_checks import check_fields, check_messages, num_logprobs, template_fields
from tokenmill.server.routes.openai import FINISH, Envelope, check_common, frame_of, options_of, token_name
from tokenmill.server.schema.openai import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    TokenLogprob,
    TopLogprob,
)

_SHORT_CHAT = 2000  # characters of all messages; longer ones are rendered in a thread
_encode = msgspec.json.Encoder().encode


async def chat_completions(call: Call) -> None:
    """Decode, render, prepare, answer."""
    await answer_chat(call, await call.decode(ChatRequest))


async def answer_chat(call: Call, body: ChatRequest) -> None:
    """Answer a chat that came by whatever route. The call's dialect should be "openai"."""
    sequences = await prepare_chat(call, body)
    answer = ChatAnswer(Envelope(call, body, "chatcmpl-"), num_logprobs(body))
    await (answering.stream if body.stream else answering.fold)(call, sequences, answer)


async def prepare_chat(call: Call, body: ChatRequest) -> answering.Sequences:
    """Check a chat, take its permits, and make its prompt: what is to be generated for it. RequestError."""
    copies = check_common(call, body)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    options = options_of(body, max_tokens=max_tokens, logprobs=num_logprobs(body))
    call.take(copies)
    prompt = await render(call, body)
    try:
        prepared = await call.service.prepare(
            prompt, options, "openai", stream=bool(body.stream), add_special_tokens=False
        )
    except ValidationError as error:
        error.param = _param(error, body)
        raise
    return answering.Sequences(
        (prepared,),
        copies,
        keep_stop=bool(body.include_stop_str_in_output),
        num_characters=len(prompt),
        receipt=receipt.wanted(call, body.receipt),
    )


async def render(call: Call, body: ChatRequest) -> str:
    """The prompt that the model's chat template makes of a chat. ValidationError, TemplateError."""
    check_fields(body)
    check_messages(body.messages)
    model, _, _ = call.service.ready()
    template = model.tokenizer.chat_template
    if template is None:
        raise TemplateError("template not found")
    source = template.source
    kwargs = {**template_fields(body, source), **(body.chat_template_kwargs or {})}
    messages = _named_for(source, body.messages)

    def work() -> str:
        return template.render(
            messages,
            documents=body.documents,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            kwargs=kwargs,
        )

    small = len(messages) <= 16 and not body.documents and sum(map(_size, messages)) <= _SHORT_CHAT
    return work() if small else await call.service.in_thread(work)


def _param(error: ValidationError, body: ChatRequest) -> str | None:
    """The field of a chat that a rule about prompts and tokens is about."""
    if error.param in (None, "prompt"):
        return "messages"
    if error.param == "max_tokens" and body.max_completion_tokens is not None:
        return "max_completion_tokens"
    return error.param


def _named_for(source: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages; OpenAI's newer name of the system's role becomes the older where the template knows only that."""
    if all(message.get("role") != "developer" for message in messages) or "developer" in source:
        return messages
    return [{**message, "role": "system"} if message.get("role") == "developer" else message for message in messages]


def _size(message: dict[str, Any]) -> int:
    """Characters of a message, about; lists and calls count as long."""
    content = message.get("content")
    return len(content) if isinstance(content, str) and "tool_calls" not in message else 200


class ChatAnswer:
    """OpenAI's chat shapes, TGI's way: the role in every delta, the finish reason on the last token's chunk."""

    def __init__(self, envelope: Envelope, num_top: int | None) -> None:
        """`num_top`: how many of the likeliest tokens to tell of each position; None: no log-probabilities."""
        self._envelope, self._num_top, self._with_logprobs = envelope, num_top, num_top is not None
        self._head, self._tail = frame_of(_encode(self._chunk([], None)))

    def chunk(self, generation: Generation, token: GeneratedToken) -> bytes:
        """See `answering.Answer`."""
        logprobs = ChatLogprobs([self._logprob(token)]) if self._with_logprobs else None
        choice = ChatChunkChoice(generation.index, ChatMessage("assistant", token.text), logprobs, FINISH[token.finish])
        return self._head + _encode(choice) + self._tail

    def closing(self, generations: Sequence[Generation]) -> bytes:
        """See `answering.Answer`: the usage, if asked for."""
        e = self._envelope
        return _encode(self._chunk([], e.usage(generations))) if e.include_usage else b""

    def fold(self, generations: Sequence[Generation], tokens: Sequence[list[GeneratedToken]]) -> bytes:
        """See `answering.Answer`."""
        e = self._envelope
        choices = []
        for generation in generations:
            its_tokens = tokens[generation.index]
            logprobs = ChatLogprobs([self._logprob(t) for t in its_tokens]) if self._with_logprobs else None
            message = ChatMessage("assistant", "".join(t.text for t in its_tokens))
            choices.append(ChatChoice(generation.index, message, logprobs, FINISH[generation.finish] or "stop"))
        usage = e.usage(generations)
        return _encode(
            ChatCompletion(
                "chat.completion", e.id, e.created, e.model, e.fingerprint, choices, usage, service_tier=e.service_tier
            )
        )

    def _chunk(self, choices: list[ChatChunkChoice], usage: Any) -> ChatChunk:
        e = self._envelope
        return ChatChunk(
            "chat.completion.chunk", e.id, e.created, e.model, e.fingerprint, choices, usage, e.service_tier
        )

    def _logprob(self, token: GeneratedToken) -> TokenLogprob:
        tokenizer, details = self._envelope.tokenizer, token.details
        raw = list(tokenizer.token_bytes(token.id))
        if details is None:
            return TokenLogprob(token_name(tokenizer, token.id), 0.0, raw, [])
        top = [
            TopLogprob(token_name(tokenizer, i), logprob, list(tokenizer.token_bytes(i)))
            for i, logprob in islice(zip(details.top_ids, details.top_logprobs, strict=True), self._num_top)
        ]
        return TokenLogprob(token_name(tokenizer, token.id), details.logprob, raw, top)
