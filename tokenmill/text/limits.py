"""Every bound on a field of a request, in one table for both APIs: field, bounds, message.

Native messages that TGI has are TGI's, word for word. Other bounds, and OpenAI's routes, name field, value and limit.
The order is TGI's, because clients see the first message only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import inf
from typing import Any, NamedTuple

import msgspec

from tokenmill.errors import ValidationError
from tokenmill.misfit import shown as shown
from tokenmill.text.options import Dialect, Options, RequestLimits

MAX_STOP_CHARACTERS = 1024  # of one stop string; the cost of comparing grows with it
MAX_LOGIT_BIAS = 1024  # entries
MAX_NAME_CHARACTERS = 1024
MAX_CHOICES = 1024  # of a guided choice
MAX_GRAMMAR_BYTES = 320 << 10  # of a field with a grammar; a schema may have 256 KiB (`grammar/schema.py`)
MAX_TEMPLATE_BYTES = 512 << 10  # of a field that a chat template iterates over
MAX_TOOLS = 128  # OpenAI's
MAX_TOOL_NAME = 256  # characters

GRAMMAR_FIELDS = (
    "response_format", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs",
)  # fmt: skip
"""Fields of OpenAI's routes that ask for a grammar."""

OPENAI_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "top_n_tokens": "top_logprobs",
    "inputs": "prompt",
    "grammar": "response_format",
    "adapter_id": "model",
}
"""Fields with another name in OpenAI's API."""


def refuse(dialect: Dialect, name: str, native: str, allowed: str, given: object = None) -> ValidationError:
    """Return the error in the words of the API that was called. `native`: TGI's text; `allowed`: follows "it must
    be"."""
    if dialect == "native":
        return ValidationError(native, name)
    field = OPENAI_NAMES.get(name, name)
    got = "" if given is None else f" Given: {shown(given)}."
    return ValidationError(f"Invalid '{field}': it must be {allowed}.{got}", field)


def not_supported(param: str, reason: str) -> ValidationError:
    """Return the error for a field that would change the answer and is not supported."""
    return ValidationError(f"`{param}` is not supported: {reason}", param)


def _itself(value: Any) -> Any:
    return value


def _longest(texts: Iterable[str]) -> int:
    return max(map(len, texts), default=0)


def _longest_value(texts: Mapping[str, str]) -> int:
    return _longest(texts.values())


def _num_bytes(value: Any) -> int:
    """Return the length of the value's JSON text; 0 if it is nested too deeply, which is refused elsewhere."""
    try:
        return len(msgspec.json.encode(value))
    except RecursionError:
        return 0


def _shortest(texts: tuple[str, ...]) -> int:
    return min(map(len, texts), default=1)


class Limit(NamedTuple):
    """One bound. `most` may name a field of `RequestLimits`; `above`: `least` itself is not allowed.

    `attribute`: the value's name in `Options`, if not its native name. `measure`: the bounded property of the value, in
    `unit`s. `native`: TGI's message, with {most} and {given}; "" for a bound that TGI does not have. `openai_least`,
    `openai_most`: wider bounds of OpenAI's routes.
    """

    name: str
    least: float = -inf
    most: float | str = inf
    above: bool = False
    native: str = ""
    attribute: str = ""
    measure: Callable[[Any], Any] = _itself
    unit: str = ""
    openai_least: float | None = None
    openai_most: int | None = None

    def bounds(self, limits: RequestLimits | None, dialect: Dialect) -> tuple[float, float]:
        """Return the smallest value and the largest."""
        most = getattr(limits, self.most) if isinstance(self.most, str) else self.most
        if dialect == "native":
            return self.least, most
        least = self.least if self.openai_least is None else self.openai_least
        return least, most if self.openai_most is None else max(most, self.openai_most)

    def check(self, value: Any, limits: RequestLimits | None, dialect: Dialect) -> None:
        """Raise ValidationError that names the field if `value` is out of bounds. None, not given, is always allowed.

        `limits`: None for a bound that names none of their fields.
        """
        if value is None:
            return
        size = self.measure(value)
        least, most = self.bounds(limits, dialect)
        if (least < size if self.above else least <= size) and size <= most and -inf < size < inf:  # false for NaN
            return
        allowed = self._range(least, most)
        if self.native:
            native = self.native.format(most=most, given=shown(size))
        else:
            native = f"`{self.name}` must be {allowed}. Given: {shown(size)}"
        raise refuse(dialect, self.name, native, allowed, size)

    def _range(self, least: float, most: float) -> str:
        unit = f" {self.unit}" if self.unit else ""
        if least == -inf:
            return f"at most {_number(most)}{unit}"
        if self.above:
            return f"more than {_number(least)}" + (f" and at most {_number(most)}" if most < inf else "") + unit
        if least == 0 and self.unit and most < inf:
            return f"at most {_number(most)}{unit}"
        return (f"between {_number(least)} and {_number(most)}" if most < inf else f"{_number(least)} or more") + unit


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


_WARMEST = 1e6
"""Above any useful temperature, and far below float32's largest number."""

THINKING_BUDGET = Limit("thinking_budget", 0, 2**31 - 1)

TABLE = (
    Limit("temperature", 0, native="`temperature` must be strictly positive"),
    Limit("temperature", 0, _WARMEST),
    Limit("repetition_penalty", 0, above=True, native="`repetition_penalty` must be strictly positive"),
    Limit("repetition_penalty", 1 / _WARMEST, _WARMEST),
    Limit("frequency_penalty", -2, 2, native="`frequency_penalty` must be >= -2.0 and <= 2.0"),
    Limit("presence_penalty", -2, 2, native="`presence_penalty` must be >= -2.0 and <= 2.0"),
    Limit("top_p", 0, 1, above=True, native="`top_p` must be > 0.0 and < 1.0"),
    Limit("typical_p", 0, 1, above=True, native="`typical_p` must be > 0.0 and < 1.0"),
    Limit("min_p", 0, 1, native="`min_p` must be >= 0.0 and <= 1.0"),
    Limit("top_k", 1, native="`top_k` must be strictly positive", openai_least=-1),  # 0 or -1: off
    Limit("top_k", 1, 2**31 - 1, openai_least=-1),
    Limit("max_new_tokens", 1, native="`max_new_tokens` must be strictly positive"),
    Limit("max_new_tokens", 1, 2**32 - 1),
    THINKING_BUDGET,
    Limit("min_new_tokens", 0, native="`min_new_tokens` must be >= 0. Given: {given}"),
    Limit("stop", 0, "max_stop_sequences", measure=len, unit="strings",
          native="`stop` supports up to {most} stop sequences. Given: {given}"),
    Limit("stop", 1, measure=_shortest, unit="characters", native="`stop` must not contain an empty string"),
    Limit("stop", 0, MAX_STOP_CHARACTERS, measure=_longest, unit="characters in each string",
          native="`stop` supports strings of up to {most} characters. Given: {given}"),
    Limit("seed", 0, 2**64 - 1, native="`seed` must be >= 0 and < 2^64. Given: {given}", openai_least=-(2**63)),
    Limit("top_n_tokens", 0, "max_top_n_tokens", attribute="logprobs", openai_most=20,
          native="`top_n_tokens` must be >= 0 and <= {most}. Given: {given}"),
    Limit("prompt_logprobs", 0, "max_top_n_tokens", openai_most=20,
          native="`prompt_logprobs` must be >= 0 and <= {most}. Given: {given}"),
    Limit("adapter_id", 0, MAX_NAME_CHARACTERS, measure=len, unit="characters"),
)  # fmt: skip
"""Bounds that do not depend on the prompt, in TGI's order. `rules.py` has rules beyond bounds."""

TRUNCATE = Limit("truncate", 1, "max_input_tokens",
                 native="`truncate` must be strictly positive and less than {most}. Given: {given}")  # fmt: skip
BEST_OF = Limit("best_of", 0, "max_best_of", native="`best_of` must be > 0 and <= {most}. Given: {given}",
                openai_least=1)  # fmt: skip

GRAMMAR = Limit("grammar", 0, MAX_GRAMMAR_BYTES, measure=_num_bytes, unit="bytes of JSON",
                native="grammar is not valid: it takes {given} bytes; at most {most} are allowed")  # fmt: skip

OPENAI_TABLE = (
    *(GRAMMAR._replace(name=name, native="") for name in GRAMMAR_FIELDS),
    Limit("n", 1, 128),
    Limit("model", 0, MAX_NAME_CHARACTERS, measure=len, unit="characters"),
    Limit("user", 0, MAX_NAME_CHARACTERS, measure=len, unit="characters"),
    Limit("safety_identifier", 0, MAX_NAME_CHARACTERS, measure=len, unit="characters"),
    Limit("prompt_cache_key", 0, MAX_NAME_CHARACTERS, measure=len, unit="characters"),
    *(
        Limit(name, 0, MAX_TEMPLATE_BYTES, measure=_num_bytes, unit="bytes of JSON")
        for name in ("tools", "functions", "chat_template_kwargs")
    ),
    Limit("logit_bias", 0, MAX_LOGIT_BIAS, measure=len, unit="tokens"),
    Limit("metadata", 0, 16, measure=len, unit="pairs"),
    Limit("metadata", 0, 64, measure=_longest, unit="characters in each key"),
    Limit("metadata", 0, 512, measure=_longest_value, unit="characters in each text"),
)
"""Bounds of fields of OpenAI's bodies. The numbers are OpenAI's, except bytes, lengths of names, and `logit_bias`."""

LOGPROBS = Limit("logprobs", 0, "max_top_n_tokens", openai_most=5)  # of completions; chats have `top_logprobs`


def given_values(options: Options) -> Iterator[tuple[Limit, Any]]:
    """Yield each bound with its value in `options`, in order."""
    for limit in TABLE:
        yield limit, getattr(options, limit.attribute or limit.name)
