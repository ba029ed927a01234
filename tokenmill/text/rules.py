"""What a request's options may be: one table of ranges and a few rules with a shape of their own.

The order is TGI's, for clients look at the first message. Backquoted names are part of TGI's texts.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import TYPE_CHECKING, NamedTuple

from tokenmill.errors import ValidationError

if TYPE_CHECKING:
    from tokenmill.text.prepare import Dialect, Options, RequestLimits

MAX_STOP_CHARACTERS = 1024  # of one stop string; comparing costs their product with the text
MAX_LOGIT_BIAS = 1024  # entries
OPENAI_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "top_n_tokens": "top_logprobs",
    "inputs": "prompt",
}
"""Fields that OpenAI's API calls otherwise."""


def refuse(dialect: Dialect, name: str, native: str, allowed: str, given: object = None) -> ValidationError:
    """The error in the words of the API that was called. `native` is TGI's text."""
    if dialect == "native":
        return ValidationError(native, name)
    field = OPENAI_NAMES.get(name, name)
    got = "" if given is None else f" Given: {given}."
    return ValidationError(f"Invalid '{field}': it must be {allowed}.{got}", field)


class _Range(NamedTuple):
    """One number's rule."""

    name: str
    allows: Callable[[float], bool]
    native: str
    openai: str


_EARLY = (
    _Range("temperature", lambda x: x >= 0, "`temperature` must be strictly positive", "0 or more"),
    _Range("repetition_penalty", lambda x: x > 0, "`repetition_penalty` must be strictly positive", "more than 0"),
    _Range(
        "frequency_penalty",
        lambda x: -2 <= x <= 2,
        "`frequency_penalty` must be >= -2.0 and <= 2.0",
        "between -2 and 2",
    ),
    _Range(
        "presence_penalty",
        lambda x: -2 <= x <= 2,
        "`presence_penalty` must be >= -2.0 and <= 2.0",
        "between -2 and 2",
    ),
    _Range("top_p", lambda x: 0 < x <= 1, "`top_p` must be > 0.0 and < 1.0", "more than 0 and at most 1"),
    _Range("typical_p", lambda x: 0 < x <= 1, "`typical_p` must be > 0.0 and < 1.0", "more than 0 and at most 1"),
    _Range("min_p", lambda x: 0 <= x <= 1, "`min_p` must be >= 0.0 and <= 1.0", "between 0 and 1"),
)


def check_options(options: Options, limits: RequestLimits, dialect: Dialect) -> None:
    """Everything that can be said without the prompt. ValidationError for the first rule broken."""
    if (options.best_of or 1) > 1 and (options.temperature == 0 or not _wants_sampling(options, dialect)):
        raise ValidationError("you must use sampling when `best_of` is > 1", "best_of")
    for rule in _EARLY:
        value = getattr(options, rule.name)
        if value is not None and not (isfinite(value) and rule.allows(value)):
            raise refuse(dialect, rule.name, rule.native, rule.openai, value)
    _check_counts(options, dialect)
    _check_stop(options, limits, dialect)
    _check_seed(options, dialect)
    _check_logprobs(options, limits, dialect)
    _check_logit_bias(options, limits, dialect)
    _check_later_features(options, dialect)


def check_truncate(options: Options, limits: RequestLimits, dialect: Dialect) -> None:
    """TGI looks at it only after it knows that there is a prompt."""
    most, given = limits.max_input_tokens, options.truncate
    if given is not None and not 0 < given <= most:
        native = f"`truncate` must be strictly positive and less than {most}. Given: {given}"
        raise refuse(dialect, "truncate", native, f"between 1 and {most}", given)


def warps(options: Options) -> bool:
    """True if an option is set that only makes sense when tokens are sampled: TGI then samples unasked."""
    below_one = (options.top_p, options.typical_p)
    warm = options.temperature is not None and options.temperature != 1.0
    return warm or bool(options.top_k) or bool(options.min_p) or any(p is not None and p < 1.0 for p in below_one)


def _wants_sampling(options: Options, dialect: Dialect) -> bool:
    told = dialect == "openai" if options.do_sample is None else options.do_sample
    return told or options.temperature is not None or warps(options)


def _check_later_features(options: Options, dialect: Dialect) -> None:
    """Parts of the API whose machinery is not here: refused by name, never ignored."""
    if options.watermark:
        raise refuse(dialect, "watermark", "`watermark` is not supported", "absent: watermarking is not supported")
    if options.adapter_id:
        given = f"`adapter_id` {options.adapter_id!r} is unknown: no adapters are loaded"
        raise refuse(dialect, "adapter_id", given, "absent: no adapters are loaded", options.adapter_id)
    if options.grammar is not None:
        raise ValidationError("grammar is not supported", "grammar" if dialect == "native" else "response_format")


def _check_counts(options: Options, dialect: Dialect) -> None:
    least_k = 1 if dialect == "native" else -1  # others say 0 or -1 for "off"
    if options.top_k is not None and options.top_k < least_k:
        raise refuse(dialect, "top_k", "`top_k` must be strictly positive", "1 or more", options.top_k)
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        native = "`max_new_tokens` must be strictly positive"
        raise refuse(dialect, "max_new_tokens", native, "1 or more", options.max_new_tokens)
    if options.min_new_tokens is not None and options.min_new_tokens < 0:
        native = f"`min_new_tokens` must be >= 0. Given: {options.min_new_tokens}"
        raise refuse(dialect, "min_new_tokens", native, "0 or more", options.min_new_tokens)


def _check_stop(options: Options, limits: RequestLimits, dialect: Dialect) -> None:
    count, most = len(options.stop), limits.max_stop_sequences
    if count > most:
        native = f"`stop` supports up to {most} stop sequences. Given: {count}"
        raise refuse(dialect, "stop", native, f"at most {most} strings", count)
    if any(not stop for stop in options.stop):
        raise refuse(dialect, "stop", "`stop` must not contain an empty string", "without empty strings")
    longest = max(map(len, options.stop), default=0)
    if longest > MAX_STOP_CHARACTERS:
        native = f"`stop` supports strings of up to {MAX_STOP_CHARACTERS} characters. Given: {longest}"
        raise refuse(dialect, "stop", native, f"strings of at most {MAX_STOP_CHARACTERS} characters", longest)


def _check_seed(options: Options, dialect: Dialect) -> None:
    if options.seed is None:
        return
    if (options.best_of or 1) > 1 and dialect == "native":
        raise ValidationError("`seed` must not be set when `best_of` > 1", "seed")
    least = 0 if dialect == "native" else -(2**63)
    if not least <= options.seed < 2**64:
        native = f"`seed` must be >= 0 and < 2^64. Given: {options.seed}"
        raise refuse(dialect, "seed", native, "an integer of 64 bits", options.seed)


def _check_logprobs(options: Options, limits: RequestLimits, dialect: Dialect) -> None:
    most = limits.max_top_n_tokens
    for name, given in (("top_n_tokens", options.logprobs), ("prompt_logprobs", options.prompt_logprobs)):
        if given is not None and not 0 <= given <= most:
            native = f"`{name}` must be >= 0 and <= {most}. Given: {given}"
            raise refuse(dialect, name, native, f"between 0 and {most}", given)


def _check_logit_bias(options: Options, limits: RequestLimits, dialect: Dialect) -> None:
    bias = options.logit_bias
    if not bias:
        return
    if len(bias) > MAX_LOGIT_BIAS:
        native = f"`logit_bias` supports up to {MAX_LOGIT_BIAS} tokens. Given: {len(bias)}"
        raise refuse(dialect, "logit_bias", native, f"at most {MAX_LOGIT_BIAS} tokens", len(bias))
    for token_id, value in bias.items():
        if not 0 <= token_id < limits.vocab_size:
            allowed = f"token ids from 0 to {limits.vocab_size - 1}"
            native = f"`logit_bias` must have {allowed}. Given: {token_id}"
            raise refuse(dialect, "logit_bias", native, f"of {allowed}", token_id)
        if not -100 <= value <= 100:  # false for NaN too
            native = f"`logit_bias` must be >= -100 and <= 100. Given: {value}"
            raise refuse(dialect, "logit_bias", native, "between -100 and 100", value)
