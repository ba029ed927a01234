"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from tokenmill.errors import ValidationError
from tokenmill.server import answering
from tokenmill.server.call import Call
from tokenmill.server.generation import GeneratedToken, Generation
from tokenmill.server.routes.openai import FINISH, Envelope, check_common, closing_events, logprob_of, options_of
from tokenmill.server.schema.openai import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest
from tokenmill.text.prepare import Options, Prepared
from tokenmill.wire.messages import TokenDetails

_encode = msgspec.json.Encoder().encode


class SuffixError(ValidationError):
    """`suffix` was given; TGI has a type of its own for it."""

    error_type = "suffix not supported"


class BatchSizeError(ValidationError):
    """Too many prompts; TGI has a type of its own for it."""

    error_type = "batch size exceeded"


async def completions(call: Call) -> None:
    """Decode, prepare each prompt, answer."""
    body = await call.decode(CompletionRequest)
    stream = bool(body.stream)
    n = check_common(call, body, most_copies=call.service.options.max_concurrent_requests)
    prompts = _prompts(call, body)
    copies = _copies(body, n)
    call.take(len(prompts) * copies)
    options = _options(body, copies if copies > n else None)
    prepared = [await call.service.prepare(prompt, options, "openai", stream=stream) for prompt in prompts]
    answer = CompletionAnswer(Envelope(call, body, "cmpl-"), body, prompts, prepared, n, copies)
    num_characters = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
    sequences = answering.Sequences(tuple(prepared), copies, num_characters=num_characters)
    await (answering.stream if stream else answering.fold)(call, sequences, answer)


def _prompts(call: Call, body: CompletionRequest) -> list[str | list[int]]:
    """The prompts, each a text or token ids. ValidationError for anything else and for too many."""
    if body.suffix:
        raise SuffixError("Suffix is not supported: put it into the prompt before the request", "suffix")
    given = body.prompt
    if isinstance(given, str):
        return [given]
    prompts: list[str | list[int]] = [given] if given and all(_is_id(x) for x in given) else given
    if not prompts:
        raise ValidationError("Invalid 'prompt': it must not be empty", "prompt")
    for prompt in prompts:
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and prompt and all(map(_is_id, prompt))):
            raise ValidationError("Invalid 'prompt': it must be a text, token ids, or a list of either", "prompt")
    most = call.service.options.max_client_batch_size
    if len(prompts) > most:
        raise BatchSizeError(
            f"Number of prompts exceeds the maximum allowed batch size of {most}. Given: {len(prompts)}", "prompt"
        )
    return prompts


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _copies(body: CompletionRequest, n: int) -> int:
    """Sequences to generate a prompt, of which the best `n` are returned."""
    best_of = n if body.best_of is None else body.best_of
    if best_of < n:
        raise ValidationError(f"Invalid 'best_of': it must be at least `n`. Given: {best_of}", "best_of")
    if body.stream and best_of > n:
        raise ValidationError("Invalid 'best_of': a stream cannot choose among more than `n`", "best_of")
    return best_of


def _options(body: CompletionRequest, best_of: int | None) -> Options:
    max_tokens = body.max_tokens
    if max_tokens == 0 and body.echo and not body.stream:
        max_tokens = 1  # only the prompt is wanted; the token that every step makes is left out of the answer
    logprobs = 0 if body.logprobs is None and best_of else body.logprobs
    options = options_of(body, max_tokens=max_tokens, logprobs=logprobs)
    wants_prompt = body.echo and body.logprobs is not None
    return msgspec.structs.replace(options, best_of=best_of, prompt_logprobs=body.logprobs if wants_prompt else None)


class CompletionAnswer:
    """OpenAI's completion shapes."""

    def __init__(
        self,
        envelope: Envelope,
        body: CompletionRequest,
        prompts: Sequence[str | list[int]],
        prepared: Sequence[Prepared],
        n: int,
        copies: int,
    ) -> None:
        self._envelope, self._n, self._copies = envelope, n, copies
        self._with_logprobs = body.logprobs is not None
        self._echo = bool(body.echo)
        self._only_echo = self._echo and body.max_tokens == 0
        decode = envelope.tokenizer.decode
        self._echoes = [
            (p if isinstance(p, str) else decode(list(one.prompt_ids))) if self._echo else ""
            for p, one in zip(prompts, prepared, strict=True)
        ]
        self._offsets: dict[int, int] = {}  # of a choice: characters of the text that its chunks carried

    def chunk(self, generation: Generation, token: GeneratedToken) -> bytes:
        """See `answering.Answer`. An echo of the prompt comes with the first token."""
        begins = token.index == 1
        offset = self._offsets.get(generation.index, 0)
        text = (self._echoes[generation.prompt_index] if begins else "") + token.text
        self._offsets[generation.index] = offset + len(text)
        logprobs = None
        if self._with_logprobs:
            rows = self._prompt_rows(generation) if begins and self._echo else []
            logprobs = self._logprobs([*rows, (token.id, logprob_of(token), token.details)], offset)
        choice = CompletionChoice(generation.index, text, logprobs, FINISH[token.finish])
        return _encode(self._object([choice], None))

    def closing(self, generations: Sequence[Generation]) -> bytes:
        """See `answering.Answer`."""
        if not self._envelope.include_usage:
            return closing_events(None)
        return closing_events(_encode(self._object([], self._envelope.usage(generations))))

    def fold(self, generations: Sequence[Generation], tokens: Sequence[list[GeneratedToken]]) -> bytes:
        """See `answering.Answer`. Choices are in the order of the prompts; of `best_of` copies the best `n`."""
        choices: list[CompletionChoice] = []
        for start in range(0, len(generations), self._copies):
            group = list(generations[start : start + self._copies])
            if self._copies > self._n:
                group.sort(key=lambda g: -g.mean_logprob)
            for generation in group[: self._n]:
                choices.append(self._choice(len(choices), generation, tokens[generation.index]))
        return _encode(self._object(choices, self._envelope.usage(generations)))

    def _choice(self, index: int, generation: Generation, tokens: list[GeneratedToken]) -> CompletionChoice:
        shown = [] if self._only_echo else tokens
        text = self._echoes[generation.prompt_index] + "".join(t.text for t in shown)
        logprobs = None
        if self._with_logprobs:
            rows = self._prompt_rows(generation) if self._echo else []
            logprobs = self._logprobs([*rows, *((t.id, logprob_of(t), t.details) for t in shown)], 0)
        return CompletionChoice(index, text, logprobs, FINISH[generation.finish] or "stop")

    def _prompt_rows(self, generation: Generation) -> list[tuple[int, float | None, TokenDetails | None]]:
        rows: list[tuple[int, float | None, TokenDetails | None]] = []
        details = [None, *generation.prompt_details]
        for token_id, one in zip(generation.prepared.prompt_ids, details, strict=False):
            rows.append((token_id, one.logprob if one else None, one))
        return rows

    def _logprobs(
        self, rows: Sequence[tuple[int, float | None, TokenDetails | None]], offset: int
    ) -> CompletionLogprobs:
        text_of = self._envelope.tokenizer.token_text
        logprobs = CompletionLogprobs([], [], [], [])
        for token_id, logprob, details in rows:
            text = text_of(token_id)
            logprobs.tokens.append(text)
            logprobs.token_logprobs.append(logprob)
            logprobs.top_logprobs.append(self._top(text, details))
            logprobs.text_offset.append(offset)
            offset += len(text)
        return logprobs

    def _top(self, text: str, details: TokenDetails | None) -> dict[str, float] | None:
        """The likeliest tokens by their texts, best first, and the chosen one, as OpenAI has it."""
        if details is None:
            return None
        top: dict[str, float] = {}
        for _, other, logprob in self._envelope.top_texts(details):
            top.setdefault(other, logprob)  # of two ids with one text the likelier counts
        top.setdefault(text, details.logprob)
        return top

    def _object(self, choices: list[CompletionChoice], usage: Any) -> Completion:
        e = self._envelope
        return Completion("text_completion", e.id, e.created, e.model, e.fingerprint, choices, usage)
