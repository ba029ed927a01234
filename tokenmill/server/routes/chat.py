"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from tokenmill.errors import TemplateError, ValidationError
from tokenmill.server import answering
from tokenmill.server.call import Call
from tokenmill.server.generation import GeneratedToken, Generation
from tokenmill.server.routes.openai import FINISH, Envelope, check_common, closing_events, options_of, refuse
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

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_SHORT_CHAT = 2000  # characters of all messages; longer ones are rendered in a thread
_encode = msgspec.json.Encoder().encode


async def chat_completions(call: Call) -> None:
    """Decode, render, prepare, answer."""
    body = await call.decode(ChatRequest)
    copies = check_common(call, body, most_copies=call.service.options.max_concurrent_requests)
    _refuse_later_fields(body)
    _check_messages(body.messages)
    call.take(copies)
    prompt = await _render(call, body)
    stream = bool(body.stream)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    options = options_of(body, max_tokens=max_tokens, logprobs=_num_logprobs(body))
    prepared = await call.service.prepare(prompt, options, "openai", stream=stream, add_special_tokens=False)
    answer = ChatAnswer(Envelope(call, body, "chatcmpl-"), with_logprobs=bool(body.logprobs))
    sequences = answering.Sequences((prepared,), copies, num_characters=len(prompt))
    await (answering.stream if stream else answering.fold)(call, sequences, answer)


async def _render(call: Call, body: ChatRequest) -> str:
    """The prompt that the model's chat template makes of the messages. TemplateError."""
    model, _, _ = call.service.ready()
    template = model.tokenizer.chat_template
    if template is None:
        raise TemplateError("template not found")

    def render() -> str:
        return template.render(
            body.messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            kwargs=body.chat_template_kwargs or {},
        )

    size = sum(len(content) for m in body.messages if isinstance(content := m.get("content"), str))
    small = size <= _SHORT_CHAT and len(body.messages) <= 16
    return render() if small else await call.service.in_thread(render)


def _refuse_later_fields(body: ChatRequest) -> None:
    choice = body.tool_choice
    if body.tools and choice != "none":
        raise refuse("tools", 'tool calls are not in this release; leave them out or send `tool_choice: "none"`')
    if choice not in (None, "none", "auto"):
        raise refuse("tool_choice", "tool calls are not in this release")
    if body.modalities not in (None, [], ["text"]):
        raise refuse("modalities", "only text is generated")
    for name in ("functions", "function_call", "audio", "prediction", "web_search_options"):
        if getattr(body, name) not in (None, [], "none"):
            raise refuse(name, "it is not in this release")
    for name in ("reasoning_effort", "verbosity"):
        if getattr(body, name) is not None:
            raise refuse(name, "set what the model's chat template knows through `chat_template_kwargs`")


def _check_messages(messages: list[dict[str, Any]]) -> None:
    """Roles and contents that can be rendered. ValidationError that names the message."""
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise ValidationError(f"Invalid '{where}.role': it must be one of {', '.join(_ROLES)}", f"{where}.role")
        if content is None and not message.get("tool_calls") and not message.get("function_call"):
            raise ValidationError(
                f"Invalid '{where}.content': it must be a text or a list of parts", f"{where}.content"
            )
        if content is not None and not isinstance(content, str | list):
            raise ValidationError(
                f"Invalid '{where}.content': it must be a text or a list of parts", f"{where}.content"
            )
        for part in content if isinstance(content, list) else ():
            _check_part(part, f"{where}.content")


def _check_part(part: object, where: str) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part, dict) and isinstance(part.get("text"), str):
        return
    if kind in ("image_url", "input_audio", "file"):
        raise ValidationError(f"`{kind}` parts are not supported: the model reads text only", where)
    raise ValidationError(f"Invalid '{where}': its parts must be of type 'text' with a `text`", where)


def _num_logprobs(body: ChatRequest) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise ValidationError("Invalid 'top_logprobs': it needs `logprobs: true`", "top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


class ChatAnswer:
    """OpenAI's chat shapes, TGI's way: the role in every delta, the finish reason on the last token's chunk."""

    def __init__(self, envelope: Envelope, *, with_logprobs: bool) -> None:
        self._envelope, self._with_logprobs = envelope, with_logprobs

    def chunk(self, generation: Generation, token: GeneratedToken) -> bytes:
        """See `answering.Answer`."""
        logprobs = ChatLogprobs([self._logprob(token)]) if self._with_logprobs else None
        choice = ChatChunkChoice(generation.index, ChatMessage("assistant", token.text), logprobs, FINISH[token.finish])
        return _encode(self._chunk([choice], None))

    def closing(self, generations: Sequence[Generation]) -> bytes:
        """See `answering.Answer`."""
        if not self._envelope.include_usage:
            return closing_events(None)
        usage = self._envelope.usage(generations)
        return closing_events(_encode(self._chunk([], usage)))

    def fold(self, generations: Sequence[Generation], tokens: Sequence[list[GeneratedToken]]) -> bytes:
        """See `answering.Answer`."""
        e = self._envelope
        choices = []
        for generation in generations:
            its_tokens = tokens[generation.index]
            logprobs = ChatLogprobs([self._logprob(t) for t in its_tokens]) if self._with_logprobs else None
            message = ChatMessage("assistant", "".join(t.text for t in its_tokens))
            choices.append(ChatChoice(generation.index, message, logprobs, FINISH[generation.finish] or "stop"))
        return _encode(
            ChatCompletion("chat.completion", e.id, e.created, e.model, e.fingerprint, choices, e.usage(generations))
        )

    def _chunk(self, choices: list[ChatChunkChoice], usage: Any) -> ChatChunk:
        e = self._envelope
        return ChatChunk("chat.completion.chunk", e.id, e.created, e.model, e.fingerprint, choices, usage)

    def _logprob(self, token: GeneratedToken) -> TokenLogprob:
        bytes_of = self._envelope.tokenizer.token_bytes
        details = token.details
        if details is None:
            return TokenLogprob(token.token_text, 0.0, list(bytes_of(token.id)), [])
        top = [TopLogprob(text, lp, list(bytes_of(i))) for i, text, lp in self._envelope.top_texts(details)]
        text = self._envelope.tokenizer.token_text(token.id)
        return TokenLogprob(text, details.logprob, list(bytes_of(token.id)), top)
