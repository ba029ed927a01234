"""What a request's options may be beyond plain bounds (`limits.py`): rules about several fields, refusals by name.

The order is TGI's, for clients look at the first message. Backquoted names are part of TGI's texts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenmill.errors import ValidationError
from tokenmill.text import limits as bounds
from tokenmill.text.limits import refuse, shown

if TYPE_CHECKING:
    from tokenmill.text.prepare import Dialect, Options, RequestLimits

_KINDS_OF_GRAMMAR = ("json", "json_object", "regex", "json_schema")


def check_options(options: Options, limits: RequestLimits, dialect: Dialect) -> None:
    """Everything that can be said without the prompt. ValidationError for the first rule broken."""
    if (options.best_of or 1) > 1 and (options.temperature == 0 or not _wants_sampling(options, dialect)):
        raise ValidationError("you must use sampling when `best_of` is > 1", "best_of")
    for limit, value in bounds.given_values(options):
        if value is not None:
            limit.check(value, limits, dialect)
            if limit.name == "seed" and (options.best_of or 1) > 1 and dialect == "native":
                raise ValidationError("`seed` must not be set when `best_of` > 1", "seed")
    _check_logit_bias(options, limits, dialect)
    _check_later_features(options, dialect)


def check_truncate(options: Options, limits: RequestLimits, dialect: Dialect) -> None:
    """TGI looks at it only after it knows that there is a prompt."""
    bounds.TRUNCATE.check(options.truncate, limits, dialect)


def check_grammar(options: Options, dialect: Dialect) -> None:
    """TGI's last rule. The shape is checked although there are no grammars yet."""
    grammar = options.grammar
    if grammar is None:
        return
    name = "grammar" if dialect == "native" else "response_format"
    if dialect == "native":
        _check_shape(grammar)
    raise ValidationError("grammar is not supported", name)


def _check_shape(grammar: Any) -> None:
    kind = grammar.get("type") if isinstance(grammar, dict) else None
    if kind not in _KINDS_OF_GRAMMAR:
        known = ", ".join(_KINDS_OF_GRAMMAR)
        raise ValidationError(f"grammar is not valid: `type` must be one of {known}. Given: {shown(kind)}", "grammar")
    if "value" not in grammar:
        raise ValidationError("grammar is not valid: `value` is missing", "grammar")


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
    if options.adapter_id:
        given = f"`adapter_id` {options.adapter_id!r} is unknown: no adapters are loaded"
        raise refuse(dialect, "adapter_id", given, "absent: no adapters are loaded", options.adapter_id)


def _check_logit_bias(options: Options, limits: RequestLimits, dialect: Dialect) -> None:
    for token_id, value in (options.logit_bias or {}).items():
        if not 0 <= token_id < limits.vocab_size:
            allowed = f"token ids from 0 to {limits.vocab_size - 1}"
            native = f"`logit_bias` must have {allowed}. Given: {token_id}"
            raise refuse(dialect, "logit_bias", native, f"of {allowed}", token_id)
        if not -100 <= value <= 100:  # false for NaN too
            native = f"`logit_bias` must be >= -100 and <= 100. Given: {value}"
            raise refuse(dialect, "logit_bias", native, "between -100 and 100", value)
