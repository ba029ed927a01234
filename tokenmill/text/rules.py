"""Rules of a request's options beyond plain bounds (`limits.py`): rules about several fields, and refusals by name.

The order is TGI's, because clients see the first message only. Backquoted names are part of TGI's texts.
"""

from __future__ import annotations

from tokenmill.errors import GrammarError, ValidationError
from tokenmill.text import guided
from tokenmill.text import limits as bounds
from tokenmill.text.limits import refuse
from tokenmill.text.options import Dialect, Options, RequestLimits
from tokenmill.wire.messages import GrammarSpec


def check_options(options: Options, limits: RequestLimits, dialect: Dialect) -> None:
    """Check all rules that do not depend on the prompt. Raises ValidationError for the first broken rule."""
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
    """Check `truncate`, which TGI does after it has seen that there is a prompt. Raises ValidationError."""
    bounds.TRUNCATE.check(options.truncate, limits, dialect)


def grammar_of(options: Options, limits: RequestLimits, dialect: Dialect) -> GrammarSpec | None:
    """Return the grammar that the answer must follow: TGI's last rule. Raises ValidationError, GrammarError."""
    grammar = options.grammar
    if grammar is None:
        return None
    if not limits.grammars:
        raise GrammarError("grammar is not supported", options.grammar_field)
    if not isinstance(grammar, GrammarSpec):
        bounds.GRAMMAR.check(grammar, limits, dialect)
    spec = grammar if isinstance(grammar, GrammarSpec) else guided.native_grammar(grammar)
    for name, given in (("ignore_eos", options.ignore_eos), ("min_new_tokens", options.min_new_tokens)):
        if given:  # a grammar decides where the answer ends
            native = f"`{name}` must not be set with a grammar. Given: {given}"
            raise refuse(dialect, name, native, "absent where the answer follows a grammar or calls a tool", given)
    return spec


def warps(options: Options) -> bool:
    """Return True if an option is set that has an effect only with sampling: TGI then samples without `do_sample`."""
    below_one = (options.top_p, options.typical_p)
    warm = options.temperature is not None and options.temperature != 1.0
    return warm or bool(options.top_k) or bool(options.min_p) or any(p is not None and p < 1.0 for p in below_one)


def _wants_sampling(options: Options, dialect: Dialect) -> bool:
    sampled = dialect == "openai" if options.do_sample is None else options.do_sample
    return sampled or options.temperature is not None or warps(options)


def _check_later_features(options: Options, dialect: Dialect) -> None:
    """Refuse, by name, parts of the API that are not implemented."""
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
