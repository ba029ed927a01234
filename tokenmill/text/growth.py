"""Bounds the values of a template: the size of a result is computed before the result is built.

The budget of `sandbox.py` ends a loop, but a single call of Python's can fill the memory between two checks of it: `'a'
* 10**12`, a replacement that is longer than the text, a list that contains itself twice at each of forty levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from re import compile as regex
from typing import Any

from jinja2 import TemplateRuntimeError

MAX_CHARACTERS = 16 << 20  # of the output, or of any intermediate string
_MAX_WIDTH = 100_000  # the limit of Jinja's sandbox for a range
_MAX_PRECISION = 308
_MAX_POWER = 64
_MAX_BITS = 1 << 16  # of a whole number
_PADDING = frozenset({"center", "ljust", "rjust", "zfill"})
_WIDE = regex(r"\d{5}|\*|:[^}]*\{")  # a width of five digits, or one from an argument


class Refused(TemplateRuntimeError):
    """Error of a template that exceeds its limits. The message is this server's, unlike that of Jinja's own errors."""


def check_size(count: int) -> None:
    """Raise Refused for more characters, or items, than a prompt can have."""
    if count > MAX_CHARACTERS:
        raise Refused(f"the chat template writes more than {MAX_CHARACTERS} characters for these messages")


def check_tree(value: Any) -> Any:
    """Return the value. Raises Refused if its text is too long, also if lists contain the same list many times."""
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
    """Raise Refused if the result of an operator would be too large."""
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
    """Return arguments such that `method(*result, **kwargs)` is the call of a string's method. Raises Refused if its
    result is too large."""
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
    """Raise Refused for a format with a large width, or one from an argument."""
    if _WIDE.search(pattern):
        raise Refused("a chat template may not format to such a width")


def guarded(filters: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Return the filters of Jinja's whose output can be much larger than their input, wrapped in argument checks."""
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
