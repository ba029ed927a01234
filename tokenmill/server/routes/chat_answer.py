"""OpenAI's chat answers: each token's chunk, and the whole answer that all chunks add up to.

The sequence's router has split thoughts and calls from the text. Tokens that belong to neither yet, such as the
delimiters of a call, make no chunk; their log-probabilities come with the next one. A choice's first token always makes
one, which has the role, as OpenAI's first chunk does: so choices begin in order, and clients that add deltas up find
the role once. TGI's rules hold as well: content or calls in every delta, the finish reason on the last token's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import msgspec

from tokenmill.server.generation import GeneratedToken, Generation
from tokenmill.server.routes.openai import FINISH, Envelope, frame_of, token_name
from tokenmill.server.schema.openai import (
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    TokenLogprob,
    ToolCall,
    TopLogprob,
    Usage,
)
from tokenmill.text.answer_reader import PLAIN, AnswerReader
from tokenmill.text.router import Delta, fold

_encode = msgspec.json.Encoder().encode


class ChatAnswer:
    """An `answering.AnswerFormat`. `num_top`: the number of likeliest tokens to list at each position; None: no
    log-probabilities. `older`: calls are returned as `function_call`, for a request with `functions`."""

    def __init__(
        self, envelope: Envelope, num_top: int | None, reader: AnswerReader = PLAIN, *, older: bool = False
    ) -> None:
        self._envelope, self._num_top, self._with_logprobs = envelope, num_top, num_top is not None
        self._thinks, self._older = reader.thinks, older
        self._head, self._tail = frame_of(_encode(self._chunk([], None)))
        self._waiting: dict[int, list[TokenLogprob]] = {}  # by choice: those of tokens without a chunk

    def chunk(self, generation: Generation, token: GeneratedToken) -> bytes:
        """See `answering.AnswerFormat`."""
        logprobs = [self._logprob(token)] if self._with_logprobs else []
        role = "assistant" if token.index == 1 else msgspec.UNSET
        if token.read is None:
            delta, finish = ChatMessage(role, token.text), FINISH[token.finish]
        else:
            logprobs = self._waiting.pop(generation.index, []) + logprobs
            if not (token.read or token.finish or token.index == 1):
                self._waiting[generation.index] = logprobs
                return b""
            delta, finish = self._delta(role, token.read), self._finish_reason(generation, token.finish)
        choice = ChatChunkChoice(
            generation.index, delta, ChatLogprobs(logprobs) if self._with_logprobs else None, finish
        )
        return self._head + _encode(choice) + self._tail

    def closing(self, generations: Sequence[Generation]) -> bytes:
        """See `answering.AnswerFormat`: the usage, if asked for."""
        return _encode(self._chunk([], self._usage(generations))) if self._envelope.include_usage else b""

    def fold(self, generations: Sequence[Generation], tokens: Sequence[list[GeneratedToken]]) -> bytes:
        """See `answering.AnswerFormat`."""
        e = self._envelope
        choices = []
        for generation in generations:
            its_tokens = tokens[generation.index]
            logprobs = ChatLogprobs([self._logprob(t) for t in its_tokens]) if self._with_logprobs else None
            if generation.router is None:
                message = ChatMessage("assistant", "".join(t.text for t in its_tokens))
            else:
                message = self._message(fold([token.read for token in its_tokens if token.read is not None]))
            finish = self._finish_reason(generation, generation.finish)
            choices.append(ChatChoice(generation.index, message, logprobs, finish or "stop"))
        usage = self._usage(generations)
        return _encode(
            ChatCompletion(
                "chat.completion", e.id, e.created, e.model, e.fingerprint, choices, usage, service_tier=e.service_tier
            )
        )

    def _finish_reason(self, generation: Generation, finish: str) -> str | None:
        """Return OpenAI's word for the end of a choice."""
        called = generation.router is not None and generation.router.complete_calls and finish in ("eos", "stop")
        return ("function_call" if self._older else "tool_calls") if called else FINISH[finish]

    def _usage(self, generations: Sequence[Generation]) -> Usage:
        usage = self._envelope.usage(generations)
        if not self._thinks:
            return usage
        count = sum(generation.num_reasoning for generation in generations)
        return msgspec.structs.replace(usage, completion_tokens_details={"reasoning_tokens": count})

    def _delta(self, role: str | msgspec.UnsetType, read: Delta) -> ChatMessage:
        calls = [
            ToolCall(
                index=call.index,
                id=msgspec.UNSET if call.id is None else call.id,
                type=msgspec.UNSET if call.id is None else "function",
                function=CalledFunction(
                    name=msgspec.UNSET if call.name is None else call.name, arguments=call.arguments
                ),
            )
            for call in read.calls
        ]
        content = read.content if read.content or not calls else msgspec.UNSET
        return self._said(role, content, read.reasoning, calls)

    def _message(self, read: Delta) -> ChatMessage:
        """Return the message of a whole choice."""
        calls = [
            ToolCall(
                id=call.id or "",
                type="function",
                function=CalledFunction(name=call.name or "", arguments=call.arguments),
            )
            for call in read.calls
        ]
        return self._said("assistant", read.content or (None if calls else ""), read.reasoning, calls)

    def _said(self, role: str | msgspec.UnsetType, content: Any, reasoning: str, calls: list[ToolCall]) -> ChatMessage:
        thought = reasoning or msgspec.UNSET
        if calls and self._older:
            return ChatMessage(role, content, thought, thought, function_call=calls[0].function)
        return ChatMessage(role, content, thought, thought, calls or msgspec.UNSET)

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
