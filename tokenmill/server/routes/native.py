"""TGI's own generation routes: `/generate`, `/generate_stream`, POST `/`."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from tokenmill.server import answering, receipt
from tokenmill.server.call import Call
from tokenmill.server.generation import GeneratedToken, Generation
from tokenmill.server.schema.native import (
    BestOfSequence,
    CompatRequest,
    Details,
    GenerateParameters,
    GenerateRequest,
    GenerateResponse,
    PrefillToken,
    StreamDetails,
    StreamResponse,
    Token,
)
from tokenmill.text.options import Options
from tokenmill.text.prepare import check_before_queue
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.wire.messages import TokenDetails

_FINISH = {"eos": "eos_token", "stop": "stop_sequence", "length": "length"}
_encode = msgspec.json.Encoder().encode


async def generate(call: Call) -> None:
    """POST /generate: one JSON object."""
    body = await call.decode(GenerateRequest)
    await _generate(call, body, stream=False)


async def generate_stream(call: Call) -> None:
    """POST /generate_stream: an event for each token."""
    body = await call.decode(GenerateRequest)
    await _generate(call, body, stream=True)


async def compat_generate(call: Call) -> None:
    """POST /: `stream` chooses. A whole answer is a list of one; the prompt is part of the text by default."""
    await answer_compat(call, await call.decode(CompatRequest))


async def answer_compat(call: Call, body: CompatRequest) -> None:
    """Answer the body of POST `/` that came by any route."""
    await _generate(call, body, stream=bool(body.stream), compat=True)


async def _generate(call: Call, body: GenerateRequest, *, stream: bool, compat: bool = False) -> None:
    model, limits, _ = call.service.ready()
    given = parameters_of(body.parameters)
    copies = max(given.best_of or 1, 1)
    options = options_of(given, stream=stream)
    check_before_queue(options, limits, stream=stream)
    call.take(copies)
    prepared = await call.service.encode(body.inputs, options, "native", stream=stream)
    full_text = compat if given.return_full_text is None else given.return_full_text
    answer = NativeAnswer(given, model.tokenizer, body.inputs if full_text else "", as_list=compat)
    prompts = answering.Prompts(
        (prepared,),
        copies,
        keep_stop=True,
        num_characters=len(body.inputs),
        receipt=receipt.requested(call, body.receipt),
    )
    await (answering.stream if stream else answering.fold)(call, prompts, answer)


def parameters_of(given: GenerateParameters | None) -> GenerateParameters:
    """Return the parameters of a request. TGI samples if none are given at all."""
    return GenerateParameters(do_sample=True) if given is None else given


def options_of(given: GenerateParameters, *, stream: bool = False) -> Options:
    """Return the parameters as options of a generation. In a stream every event has a log-probability."""
    copies = max(given.best_of or 1, 1)
    top_n = given.top_n_tokens or 0
    needs_logprobs = stream or given.details or given.decoder_input_details or copies > 1
    return Options(
        max_new_tokens=given.max_new_tokens,
        min_new_tokens=given.min_new_tokens,
        do_sample=bool(given.do_sample),
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        typical_p=given.typical_p,
        min_p=given.min_p,
        repetition_penalty=given.repetition_penalty,
        frequency_penalty=given.frequency_penalty,
        presence_penalty=given.presence_penalty,
        seed=given.seed,
        stop=(given.stop,) if isinstance(given.stop, str) else tuple(given.stop or ()),
        ignore_eos=bool(given.ignore_eos),
        logprobs=top_n if needs_logprobs or top_n else None,
        raw_logprobs=False,
        prompt_logprobs=0 if given.decoder_input_details else None,
        truncate=given.truncate,
        best_of=copies,
        watermark=bool(given.watermark),
        adapter_id=given.adapter_id,
        grammar=given.grammar,
    )


class NativeAnswer:
    """TGI's answers. `prefix`: put before the text; `as_list`: the answer of POST `/`."""

    def __init__(self, given: GenerateParameters, tokenizer: Tokenizer, prefix: str, *, as_list: bool) -> None:
        self._tokenizer, self._prefix, self._as_list = tokenizer, prefix, as_list
        self._stream_details = bool(given.details)
        self._details = bool(given.details or given.decoder_input_details)
        self._prefill = bool(given.decoder_input_details)
        self._top_n = bool(given.top_n_tokens)
        self._num_shown = 0  # number of characters of ordinary tokens in the events so far

    def chunk(self, generation: Generation, token: GeneratedToken) -> bytes:
        """See `answering.AnswerFormat`."""
        text = None
        details = None
        if token.finish:
            text = self._prefix + generation.text
            if self._stream_details:
                p = generation.prepared
                details = StreamDetails(_FINISH[token.finish], generation.num_generated, p.seed, p.num_prompt)
        shown = _token(token, generation, self._num_shown)
        self._num_shown += 0 if token.special else len(shown.text)
        return _encode(
            StreamResponse(
                index=token.index,
                token=shown,
                top_tokens=self._top(token.details) if self._top_n else msgspec.UNSET,
                generated_text=text,
                details=details,
            )
        )

    def closing(self, generations: Sequence[Generation]) -> bytes:
        """See `answering.AnswerFormat`: native streams have no event after the last token."""
        return b""

    def fold(self, generations: Sequence[Generation], tokens: Sequence[list[GeneratedToken]]) -> bytes:
        """See `answering.AnswerFormat`. The best has the highest mean log-probability; of equals, the first."""
        best = max(generations, key=lambda g: g.mean_logprob)
        response = GenerateResponse(self._prefix + best.text)
        if self._details:
            one = self._sequence(best, tokens[best.index])
            others = [self._sequence(g, tokens[g.index]) for g in generations if g is not best]
            details = Details(
                finish_reason=one.finish_reason,
                generated_tokens=one.generated_tokens,
                seed=one.seed,
                prefill=one.prefill,
                tokens=one.tokens,
                best_of_sequences=others or msgspec.UNSET,
                top_tokens=one.top_tokens,
            )
            response = GenerateResponse(response.generated_text, details)
        return _encode([response] if self._as_list else response)

    def _sequence(self, generation: Generation, tokens: list[GeneratedToken]) -> BestOfSequence:
        shown: list[Token] = []
        num_shown = 0
        for token in tokens:
            shown.append(_token(token, generation, num_shown))
            num_shown += 0 if token.special else len(shown[-1].text)
        return BestOfSequence(
            generated_text=self._prefix + generation.text,
            finish_reason=_FINISH[generation.finish],
            generated_tokens=generation.num_generated,
            seed=generation.prepared.seed,
            prefill=self._prefill_tokens(generation) if self._prefill else [],
            tokens=shown,
            top_tokens=[self._top(token.details) for token in tokens] if self._top_n else msgspec.UNSET,
        )

    def _prefill_tokens(self, generation: Generation) -> list[PrefillToken]:
        ids = generation.prepared.prefill_ids
        logprobs = [None, *(details.logprob for details in generation.prompt_details)]
        logprobs += [None] * (len(ids) - len(logprobs))
        text_of = self._tokenizer.token_text
        return [PrefillToken(i, text_of(i), logprob) for i, logprob in zip(ids, logprobs, strict=False)]

    def _top(self, details: TokenDetails | None) -> list[Token]:
        if details is None:
            return []
        tokenizer = self._tokenizer
        pairs = zip(details.top_ids, details.top_logprobs, strict=True)
        return [Token(i, tokenizer.token_text(i), logprob, tokenizer.is_special(i)) for i, logprob in pairs]


def _token(token: GeneratedToken, generation: Generation, num_shown: int) -> Token:
    """Return the token as clients see it. Text behind a stop string in the token's middle is cut off, as in the
    answer."""
    text = token.token_text
    if token.finish == "stop" and not token.special:
        text = text[: max(len(generation.text) - num_shown, 0)]
    return Token(token.id, text, token.details.logprob if token.details else 0.0, token.special)
