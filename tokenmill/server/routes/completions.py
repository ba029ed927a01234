"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import msgspec

from tokenmill.errors import ValidationError
from tokenmill.server import answering, receipt
from tokenmill.server.call import Call
from tokenmill.server.generation import GeneratedToken, Generation
from tokenmill.server.options import ServiceOptions
from tokenmill.server.routes.openai import (
    FINISH,
    Envelope,
    check_common,
    frame_of,
    grammar_of,
    options_of,
    token_name,
)
from tokenmill.server.schema.openai import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest, Usage
from tokenmill.text.detokenizer import Detokenizer
from tokenmill.text.guided import RequestedGrammar
from tokenmill.text.limits import LOGPROBS
from tokenmill.text.options import Options
from tokenmill.text.prepare import Prepared, check_before_queue
from tokenmill.wire.messages import TokenDetails

MAX_BEST_OF = 20  # OpenAI's; with sampling, --max-best-of applies, too
_encode = msgspec.json.Encoder().encode


class SuffixError(ValidationError):
    """`suffix` was given; TGI has an error type for it."""

    error_type = "suffix not supported"


class BatchSizeError(ValidationError):
    """Too many prompts; TGI has an error type for it."""

    error_type = "batch size exceeded"


async def completions(call: Call) -> None:
    """Decode, prepare each prompt, answer."""
    await answer_completion(call, await call.decode(CompletionRequest))


async def answer_completion(call: Call, body: CompletionRequest) -> None:
    """Answer a completion that came by any route. The call's dialect should be "openai"."""
    given = await call.work(lambda: _prompts(call.service.options, body))
    n = check_common(call, body, num_prompts=len(given))
    copies = _copies(body, n)
    limits = call.service.ready().limits
    LOGPROBS.check(body.logprobs, limits, "openai")
    options = _options(body, copies if copies > n else None, await grammar_of(call, body))
    check_before_queue(options, limits, stream=bool(body.stream), dialect="openai")
    call.take(len(given) * copies)
    prepared = [await call.service.encode(p, options, "openai", stream=bool(body.stream)) for p in given]
    answer = CompletionAnswer(Envelope(call, body, "cmpl-"), body, given, prepared, Counts(n, copies))
    prompts = answering.Prompts(
        tuple(prepared),
        copies,
        keep_stop=bool(body.include_stop_str_in_output),
        num_characters=sum(len(prompt) for prompt in given if isinstance(prompt, str)),
        receipt=receipt.requested(call, body.receipt),
    )
    await (answering.stream if body.stream else answering.fold)(call, prompts, answer)


def _prompts(options: ServiceOptions, body: CompletionRequest) -> list[str | list[int]]:
    """Return the prompts, each a text or token ids. Raises ValidationError for anything else, and for too many."""
    if body.suffix:
        raise SuffixError("Suffix is not supported: put it into the prompt before the request", "suffix")
    given = body.prompt
    if isinstance(given, str):
        return [given]
    prompts: list[str | list[int]] = [given] if _are_ids(given) else given
    if not prompts:
        raise ValidationError("Invalid 'prompt': it must not be empty", "prompt")
    most = min(options.max_client_batch_size, options.max_concurrent_requests)
    for prompt in prompts[: most + 1]:
        if not isinstance(prompt, str) and not _are_ids(prompt):
            raise ValidationError("Invalid 'prompt': it must be a text, token ids, or a list of either", "prompt")
    if len(prompts) > most:
        raise BatchSizeError(
            f"Number of prompts exceeds the maximum allowed batch size of {most}. Given: {len(prompts)}", "prompt"
        )
    return prompts


def _are_ids(value: Any) -> bool:
    """Return True for a list of whole numbers, at least one."""
    return isinstance(value, list) and set(map(type, value)) == {int}


def _copies(body: CompletionRequest, n: int) -> int:
    """Return the number of sequences to generate for a prompt, of which the best `n` are returned."""
    best_of = n if body.best_of is None else body.best_of
    if best_of < n:
        raise ValidationError(f"Invalid 'best_of': it must be at least `n`. Given: {best_of}", "best_of")
    if body.stream and best_of > n:
        raise ValidationError("Invalid 'best_of': a stream cannot choose among more than `n`", "best_of")
    return n if body.temperature == 0.0 and best_of <= MAX_BEST_OF else best_of  # greedy sequences are all equal


def _options(body: CompletionRequest, best_of: int | None, requested: RequestedGrammar | None) -> Options:
    logprobs = body.logprobs
    max_tokens = 1 if body.max_tokens == 0 else body.max_tokens  # every step makes a token, which is hidden
    options = options_of(body, max_tokens=max_tokens, logprobs=0 if logprobs is None and best_of else logprobs)
    return msgspec.structs.replace(
        options,
        best_of=best_of,
        prompt_logprobs=logprobs if body.echo else None,
        grammar=requested and requested.grammar,
        grammar_field=requested.field if requested else "",
    )


class Counts(NamedTuple):
    """Numbers of choices for each prompt in the answer, and of sequences generated for them."""

    n: int
    copies: int


class Row(NamedTuple):
    """A token in the lists of log-probabilities. `offset`: the character of the text at which it begins."""

    id: int
    offset: int
    details: TokenDetails | None


class CompletionAnswer:
    """OpenAI's completions. With `max_tokens: 0` the text is the echo of the prompt alone."""

    def __init__(
        self,
        envelope: Envelope,
        body: CompletionRequest,
        prompts: Sequence[str | list[int]],
        prepared: Sequence[Prepared],
        counts: Counts,
    ) -> None:
        self._envelope, (self._n, self._copies) = envelope, counts
        self._with_logprobs, self._num_top = body.logprobs is not None, body.logprobs
        self._echo = bool(body.echo)
        self._hides = body.max_tokens == 0
        decode = envelope.tokenizer.decode
        self._echoes = [
            (p if isinstance(p, str) and not one.num_truncated else decode(one.prompt_ids)) if self._echo else ""
            for p, one in zip(prompts, prepared, strict=True)
        ]
        self._head, self._tail = frame_of(_encode(self._object([], None)))
        self._offsets: dict[int, int] = {}  # by choice: number of characters of the tokens sent so far

    def chunk(self, generation: Generation, token: GeneratedToken) -> bytes:
        """See `answering.AnswerFormat`. An echo of the prompt comes with the first token."""
        text = "" if self._hides else token.text
        shown = () if self._hides else (token,)
        logprobs = None
        if token.index == 1:
            text = self._echoes[generation.prompt_index] + text
            if self._with_logprobs:
                logprobs = self._logprobs(self._rows(generation, shown))
        elif self._with_logprobs:
            logprobs = self._logprobs(self._token_rows(generation, shown))
        choice = CompletionChoice(generation.index, text, logprobs, FINISH[token.finish])
        return self._head + _encode(choice) + self._tail

    def closing(self, generations: Sequence[Generation]) -> bytes:
        """See `answering.AnswerFormat`: the usage, if asked for."""
        return _encode(self._object([], self._usage(generations))) if self._envelope.include_usage else b""

    def fold(self, generations: Sequence[Generation], tokens: Sequence[list[GeneratedToken]]) -> bytes:
        """See `answering.AnswerFormat`. Choices are in the order of the prompts; of `best_of` copies the best `n`."""
        choices: list[CompletionChoice] = []
        for start in range(0, len(generations), self._copies):
            group = list(generations[start : start + self._copies])
            if self._copies > self._n:
                group.sort(key=lambda g: -g.mean_logprob)
            for generation in group[: self._n]:
                choices.append(self._choice(len(choices), generation, tokens[generation.index]))
        return _encode(self._object(choices, self._usage(generations)))

    def _choice(self, index: int, generation: Generation, tokens: Sequence[GeneratedToken]) -> CompletionChoice:
        shown = () if self._hides else tokens
        text = self._echoes[generation.prompt_index] + "".join(t.text for t in shown)
        logprobs = self._logprobs(self._rows(generation, shown)) if self._with_logprobs else None
        return CompletionChoice(index, text, logprobs, FINISH[generation.finish] or "stop")

    def _usage(self, generations: Sequence[Generation]) -> Usage:
        usage = self._envelope.usage(generations)
        if not self._hides:
            return usage
        return msgspec.structs.replace(usage, completion_tokens=0, total_tokens=usage.prompt_tokens)

    def _rows(self, generation: Generation, tokens: Sequence[GeneratedToken]) -> list[Row]:
        """Return the rows of an answer: of the prompt if it is echoed, then of `tokens`."""
        rows: list[Row] = []
        if self._echo:
            echo, ids = self._echoes[generation.prompt_index], generation.prepared.prompt_ids
            detokenizer = Detokenizer(self._envelope.tokenizer)
            texts = [detokenizer.push(token_id).text for token_id in ids]
            added = "".join(texts).startswith(" ") and echo[:1] != " "  # by the tokenizer, before the first word
            offset = -1 if added else 0
            for token_id, text, details in zip(ids, texts, [None, *generation.prompt_details], strict=False):
                rows.append(Row(token_id, min(max(offset, 0), len(echo)), details))
                offset += len(text)
            self._offsets[generation.index] = len(echo)
        return rows + self._token_rows(generation, tokens)

    def _token_rows(self, generation: Generation, tokens: Sequence[GeneratedToken]) -> list[Row]:
        rows: list[Row] = []
        offset = self._offsets.get(generation.index, 0)
        for token in tokens:
            rows.append(Row(token.id, offset, token.details))
            offset += 0 if token.special else len(token.token_text)
        self._offsets[generation.index] = offset
        return rows

    def _logprobs(self, rows: Sequence[Row]) -> CompletionLogprobs:
        logprobs = CompletionLogprobs([], [], [], [])
        for token_id, offset, details in rows:
            name = self._name(token_id)
            logprobs.tokens.append(name)
            logprobs.token_logprobs.append(details.logprob if details else None)
            logprobs.top_logprobs.append(self._top(name, details))
            logprobs.text_offset.append(offset)
        return logprobs

    def _top(self, chosen: str, details: TokenDetails | None) -> dict[str, float] | None:
        """Return the likeliest tokens by their texts, best first, and the chosen one, as OpenAI does."""
        if details is None:
            return None
        top: dict[str, float] = {}
        for token_id, logprob in islice(zip(details.top_ids, details.top_logprobs, strict=True), self._num_top):
            top.setdefault(self._name(token_id), logprob)  # of two ids with the same text, the likelier one is kept
        top.setdefault(chosen, details.logprob)
        return top

    def _name(self, token_id: int) -> str:
        return token_name(self._envelope.tokenizer, token_id, "bytes:")

    def _object(self, choices: list[CompletionChoice], usage: Any) -> Completion:
        e = self._envelope
        return Completion("text_completion", e.id, e.created, e.model, e.fingerprint, choices, usage)
