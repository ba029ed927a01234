"""Keeps a template's values small: what filters, methods and arithmetic would build is measured before it is built.

A loop is ended by the budget of `sandbox.py`, but one call of Python's can fill the memory between two looks at it:
`'a' * 10**12`, a replacement that is longer than the text, a list that holds itself twice at each of forty levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from re import compile as regex
from typing import Any

from jinja2 import TemplateRuntimeError

MAX_CHARACTERS = 16 << 20  # of output, or of any one string on the way
_MAX_WIDTH = 100_000  # what Jinja's sandbox allows a range
_MAX_PRECISION = 308
_MAX_POWER = 64
_MAX_BITS = 1 << 16  # of a whole number
_PADDING = frozenset({"center", "ljust", "rjust", "zfill"})
_WIDE = regex(r"\d{5}|\*|:[^}]*\{")  # a width of five digits, or one that an argument gives


class Refused(TemplateRuntimeError):
    """A template goes beyond its limits; the message is ours, unlike that of Jinja's own errors."""


def check_size(count: int) -> None:
    """Refused for more characters, or items, than a prompt can have."""
    if count > MAX_CHARACTERS:
        raise Refused(f"the chat template writes more than {MAX_CHARACTERS} characters for these messages")


def check_tree(value: Any) -> Any:
    """The value, once it is known that its text is not too long however often lists hold the same list."""
    if not isinstance(value, (list, tuple, dict)):
        return value
    size = 0
    waiting: list[Any] = [value]
    while waiting:
        each = waiting.pop()
        size += 1
        if isinstance(each, Mapping):
            size += sum(map(_length, each))
            waiting.extend(each.values())
        elif isinstance(each, (list, tuple)):
            waiting.extend(each)
        else:
            size += _length(each)
        check_size(size + len(waiting))
    return value


def check_arithmetic(operator: str, left: Any, right: Any) -> None:
    """What an operator would make of two values."""
    if operator == "*":
        check_size(_length(left) * _whole(right) + _length(right) * _whole(left))
        _check_bits(_bits(left) + _bits(right))
    elif operator == "+":
        check_size(_length(left) + _length(right))
    elif operator == "**":
        if _whole(right) > _MAX_POWER:
            raise Refused(f"the power of {right} is too large for a chat template")
        _check_bits(_bits(left) * max(_whole(right), 1))
    elif operator == "%" and isinstance(left, str):
        check_widths(left)


def check_call(method: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """A call of a string's method, as `method(*result, **kwargs)` once its result is known to be small."""
    owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if not isinstance(owner, str):
        return args
    if name in _PADDING:
        check_size(max(map(_whole, args), default=0))
    elif name == "expandtabs":
        check_size(len(owner) * max(map(_whole, (*args, *kwargs.values(), 8))))
    elif name in ("format", "format_map"):
        check_widths(owner)
    elif name == "replace":
        _check_replace(owner, *args[:2])
    elif name == "translate":
        table = args[0] if args and isinstance(args[0], Mapping) else {}
        check_size(len(owner) * max(map(_length, table.values()), default=0))
    elif name == "join" and args:
        parts = list(args[0])
        check_size(sum(map(_length, parts)) + len(owner) * len(parts))
        return (parts, *args[1:])
    return args


def check_widths(pattern: str) -> None:
    """Refused for a format that pads without measure."""
    if _WIDE.search(pattern):
        raise Refused("a chat template may not format to such a width")


def guarded(filters: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Those of Jinja's filters that can make much of little, each behind a look at its arguments."""
    return {name: _behind(check, filters[name]) for name, check in _CHECKS.items()}


def _behind(check: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # the environment or context comes before the value

    @wraps(function)
    def guard(*args: Any, **kwargs: Any) -> Any:
        value = check(*args[first:], **kwargs)
        return function(*args[:first], value, *args[first + 1 :], **kwargs)

    return guard


def _join(value: Any, d: Any = "", attribute: Any = None) -> list[Any]:
    parts = list(value)
    check_size(sum(map(_length, parts)) + _length(d) * len(parts))
    return [check_tree(part) for part in parts]


def _sum(iterable: Any, attribute: Any = None, start: Any = 0) -> list[Any]:
    parts = list(iterable)
    if not isinstance(start, (int, float)):
        raise Refused("a chat template may only sum up numbers")
    return parts


def _replace(s: Any, old: Any, new: Any, count: Any = None) -> Any:
    if isinstance(s, str):
        _check_replace(s, old, new)
    return s


def _indent(s: Any, width: Any = 4, first: Any = False, blank: Any = False) -> Any:
    check_size((_length(s) + 1) * (_whole(width) + _length(width)) if _length(s) else _whole(width))
    return s


def _wordwrap(s: Any, width: Any = 79, break_long_words: Any = True, wrapstring: Any = None, *more: Any) -> Any:
    check_size(_length(s) * (_length(wrapstring) + 1))
    return s


def _format(value: Any, *args: Any, **kwargs: Any) -> Any:
    check_widths(str(value))
    return value


def _slices(value: Any, count: Any, fill_with: Any = None) -> Any:
    if _whole(count) > _MAX_WIDTH:
        raise Refused(f"a chat template may not cut into {count} parts")
    return value


def _round(value: Any, precision: Any = 0, method: Any = "common") -> Any:
    if _whole(precision) > _MAX_PRECISION:
        raise Refused(f"a chat template may not round to {precision} digits")
    return value


def _tree(value: Any, *args: Any, **kwargs: Any) -> Any:
    return check_tree(value)


_CHECKS: Mapping[str, Callable[..., Any]] = {
    "batch": _slices,
    "format": _format,
    "indent": _indent,
    "join": _join,
    "pprint": _tree,
    "replace": _replace,
    "round": _round,
    "slice": _slices,
    "string": _tree,
    "sum": _sum,
    "wordwrap": _wordwrap,
}


def _check_replace(text: str, old: Any = "", new: Any = "") -> None:
    if isinstance(old, str) and isinstance(new, str) and len(new) > len(old):
        check_size(len(text) + text.count(old) * (len(new) - len(old)))


def _check_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise Refused("a number is too large for a chat template")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _whole(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 0


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0
