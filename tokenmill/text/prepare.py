"""From a client's request to the engine's: all rules that a request can break, in TGI's order and words.

`Options` is independent of the API: both fill it in, None for fields that the client did not give. After `prepare`
every field is final. Messages of TGI's native routes are TGI's own, without its prefix "Input validation error: ";
those of OpenAI's routes use that API's names of fields.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import msgspec

from tokenmill.errors import ContextLengthError, ValidationError
from tokenmill.text import rules
from tokenmill.text.limits import BEST_OF, refuse
from tokenmill.text.options import Dialect, Options, RequestLimits
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.wire.messages import GrammarSpec, SamplingParams, StoppingParams

MAX_SEED = 2**64 - 1
_CHECKED_NEW_TOKENS = 1024  # TGI checks that this many fit, and ends longer answers when the context is full
_LONG = 4  # characters for each token that fits; longer texts are counted before they are encoded
_PIECE = 32_768  # characters that are counted at a time
_CUT = 64  # tokens that a cut may add
_COLDEST = 1e-5  # at lower temperatures logits exceed float32's range


class Prepared(msgspec.Struct, frozen=True):
    """A valid request. `seed` None: greedy, without randomness. `stop`: strings, for the detokenizer. `num_truncated`:
    tokens of the prompt that `truncate` cut off."""

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    stopping: StoppingParams
    stop: tuple[str, ...]
    seed: int | None
    num_truncated: int = 0
    grammar: GrammarSpec | None = None
    grammar_field: str = ""  # the request's field that errors name
    num_started: int = 0  # last tokens of `prompt_ids` that begin an answer of its own, by an encoder and decoder

    @property
    def num_prompt(self) -> int:
        """Number of tokens of the prompt, after truncation."""
        return len(self.prompt_ids) - self.num_started

    @property
    def ids_before(self) -> tuple[int, ...]:
        """Tokens that the answer's text continues."""
        return () if self.num_started else self.prompt_ids

    @property
    def prefill_ids(self) -> tuple[int, ...]:
        """Tokens that a decoder reads before its first new one."""
        return self.prompt_ids[-self.num_started :]


def check_before_queue(options: Options, limits: RequestLimits, *, stream: bool, dialect: Dialect = "native") -> None:
    """Check the rules that TGI checks before a request may enter the queue. Raises ValidationError."""
    best_of = 1 if options.best_of is None else options.best_of
    if stream:
        if best_of != 1:
            native = "`best_of` != 1 is not supported when streaming tokens"
            raise refuse(dialect, "best_of", native, "1 in a stream", best_of)
        if options.prompt_logprobs is not None and dialect == "native":
            raise ValidationError(
                "`decoder_input_details` == true is not supported when streaming tokens", "decoder_input_details"
            )
    elif best_of > 1 and limits.max_best_of == 1:
        raise refuse(dialect, "best_of", "`best_of` != 1 is not allowed for this endpoint", "1", best_of)
    else:
        BEST_OF.check(options.best_of, limits, dialect)


def prepare(
    prompt: str | Sequence[int],
    options: Options,
    limits: RequestLimits,
    tokenizer: Tokenizer,
    *,
    add_special_tokens: bool = True,
    dialect: Dialect = "native",
    stream: bool = False,
) -> Prepared:
    """Check a request and fill in every default. Encodes: call it outside of an event loop's thread.

    Raises ValidationError for the first broken rule, ContextLengthError if prompt and requested tokens do not fit. A
    seed is drawn if none is given and tokens are sampled.
    """
    check_before_queue(options, limits, stream=stream, dialect=dialect)
    rules.check_options(options, limits, dialect)
    whole_ids = _prompt_ids(prompt, options, limits, tokenizer, add_special_tokens, dialect)
    prompt_ids = whole_ids if options.truncate is None else whole_ids[-options.truncate :]
    num_truncated, start = len(whole_ids) - len(prompt_ids), tokenizer.answer_start
    if start and options.prompt_logprobs is not None and dialect == "openai":
        raise ValidationError(
            "a prompt of this model has no log-probabilities: an encoder reads it. Leave out `echo` or `logprobs`",
            "echo",
        )
    prompt_ids += start
    max_new_tokens = _max_new_tokens(len(prompt_ids), options, limits, dialect)
    min_new_tokens = options.min_new_tokens or 0
    if min_new_tokens > max_new_tokens:
        native = f"`min_new_tokens` must be <= `max_new_tokens`. Given: {min_new_tokens} and {max_new_tokens}"
        allowed = f"at most the number of tokens to generate, {max_new_tokens}"
        raise refuse(dialect, "min_new_tokens", native, allowed, min_new_tokens)
    grammar = rules.grammar_of(options, limits, dialect)
    ends = tokenizer.eos_ids if grammar is None else tokenizer.grammar_end_ids
    stop_ids = () if options.ignore_eos else tuple(i for i in ends if i < limits.vocab_size)
    sampling, seed = _sampling(options, limits, dialect)
    thought = options.thought
    ending = (thought.force_after, thought.forced_ids, thought.unless) if thought else ()
    stopping = StoppingParams(max_new_tokens, min_new_tokens, stop_ids, *ending)
    if start:
        sampling = msgspec.structs.replace(sampling, prompt_logprobs=-1)
    return Prepared(prompt_ids, sampling, stopping, options.stop, seed, num_truncated, grammar, options.grammar_field,
                    len(start))  # fmt: skip


def _prompt_ids(
    prompt: str | Sequence[int],
    options: Options,
    limits: RequestLimits,
    tokenizer: Tokenizer,
    add_special_tokens: bool,
    dialect: Dialect,
) -> tuple[int, ...]:
    if not prompt:
        raise refuse(dialect, "inputs", "`inputs` cannot be empty", "not empty")
    rules.check_truncate(options, limits, dialect)
    if isinstance(prompt, str) and options.truncate is None and len(prompt) > _LONG * limits.max_total_tokens:
        _check_beginning(prompt, options, limits, tokenizer, dialect)
    ids = tokenizer.encode(prompt, add_special_tokens) if isinstance(prompt, str) else list(prompt)
    if not ids:
        raise refuse(dialect, "inputs", "`inputs` cannot be empty", "text that has tokens")
    if min(ids) < 0 or max(ids) >= limits.vocab_size:
        wrong = next(i for i in ids if not 0 <= i < limits.vocab_size)
        last = limits.vocab_size - 1
        native = f"`inputs` has token id {wrong}; ids are 0 to {last}"
        raise refuse(dialect, "inputs", native, f"token ids from 0 to {last}", wrong)
    return tuple(ids)


def _check_beginning(
    prompt: str, options: Options, limits: RequestLimits, tokenizer: Tokenizer, dialect: Dialect
) -> None:
    """Raise ContextLengthError for a text whose beginning alone does not fit, because encoding megabytes takes
    seconds."""
    least = 0
    for at in range(0, len(prompt), _PIECE):
        least += max(len(tokenizer.encode(prompt[at : at + _PIECE], False)) - _CUT, 0)
        if least > limits.max_total_tokens:
            _max_new_tokens(least, options, limits, dialect, "at least ")


def _max_new_tokens(num_prompt: int, options: Options, limits: RequestLimits, dialect: Dialect, about: str = "") -> int:
    """Return the number of tokens to generate at most. Native routes cut a request off at the context's end, if 1,024
    tokens fit; OpenAI's refuse it. `about`: text before `num_prompt` in messages."""
    room = limits.max_total_tokens - num_prompt
    requested = max(room, 0) if options.max_new_tokens is None else options.max_new_tokens
    checked = requested if dialect == "openai" else min(requested, _CHECKED_NEW_TOKENS)
    if num_prompt + checked > limits.max_total_tokens:
        if dialect == "openai":
            raise _too_long_for_openai(num_prompt, options.max_new_tokens, limits, about)
        raise ContextLengthError(
            f"`inputs` tokens + `max_new_tokens` must be <= {limits.max_total_tokens}. "
            f"Given: {about}{num_prompt} `inputs` tokens and {checked} `max_new_tokens`"
        )
    if num_prompt > limits.max_input_tokens or room < 1:
        if dialect == "openai":
            raise _too_long_for_openai(num_prompt, None, limits)
        raise ContextLengthError(f"`inputs` must have less than {limits.max_input_tokens} tokens. Given: {num_prompt}")
    return min(requested, room)


def _too_long_for_openai(
    num_prompt: int, new_tokens: int | None, limits: RequestLimits, about: str = ""
) -> ContextLengthError:
    if new_tokens:
        parts = f"{about}{num_prompt} in the prompt, {new_tokens} in the completion"
        asked = f"you requested {about}{num_prompt + new_tokens} tokens ({parts})"
        also = ""
    else:
        asked = f"your prompt has {about}{num_prompt} tokens"
        also = f", and it takes prompts of at most {limits.max_input_tokens} tokens"
    # clients search for the first words
    limit = f"This model's maximum context length is {limits.max_total_tokens} tokens{also}"
    message = f"{limit}. However, {asked}. Please reduce the length of the prompt or completion."
    return ContextLengthError(message, "prompt")


def _sampling(options: Options, limits: RequestLimits, dialect: Dialect) -> tuple[SamplingParams, int | None]:
    """Return the parameters with every default filled in, and the seed if there is randomness."""
    temperature, seed = _temperature(options, dialect), None
    if temperature:
        seed = secrets.randbits(64) if options.seed is None else options.seed & MAX_SEED
    raw = dialect == "openai" if options.raw_logprobs is None else options.raw_logprobs
    params = SamplingParams(
        temperature=temperature,
        top_k=_top_k(options, limits),
        top_p=_or(options.top_p, 1.0),
        typical_p=_or(options.typical_p, 1.0),
        min_p=_or(options.min_p, 0.0),
        repetition_penalty=_or(options.repetition_penalty, 1.0),
        frequency_penalty=_or(options.frequency_penalty, 0.0),
        presence_penalty=_or(options.presence_penalty, 0.0),
        seed=seed or 0,
        logit_bias=tuple(sorted((options.logit_bias or {}).items())),
        logprobs=-1 if options.logprobs is None else options.logprobs,
        raw_logprobs=raw,
        prompt_logprobs=-1 if options.prompt_logprobs is None else options.prompt_logprobs,
        watermark_gamma=limits.watermark_gamma if options.watermark else 0.0,
        watermark_delta=limits.watermark_delta if options.watermark else 0.0,
    )
    return params, seed


def _temperature(options: Options, dialect: Dialect) -> float:
    """Return the temperature; 0 for the likeliest token."""
    temperature = _or(options.temperature, 1.0)
    if temperature == 0.0:
        return 0.0
    sampled = dialect == "openai" if options.do_sample is None else options.do_sample
    if not sampled and not rules.warps(options):
        return 0.0
    return max(temperature, _COLDEST)


def _top_k(options: Options, limits: RequestLimits) -> int:
    requested = options.top_k or 0
    return requested if 0 < requested < limits.vocab_size else 0


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
