"""Explain which part of a value does not fit a type, and what is allowed, independently of the validating library.

msgspec decides whether a value fits. Its messages are not parsed: the invalid part is found by validating the parts of
the value one by one.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

import msgspec
from msgspec import inspect

MAX_SHOWN = 64  # characters of a value that a message repeats
_MAX_ITEMS = 10_000  # items of a list or an object that are validated one by one
_UNIONS = (Union, types.UnionType)


class Misfit(NamedTuple):
    """Innermost part that does not fit. `steps`: keys and indices that lead to it."""

    steps: tuple[str | int, ...]
    allowed: str  # follows "must be"
    given: str = ""  # value as shown in a message; "" for objects, lists and missing fields
    missing: bool = False
    reason: str = ""  # message of a struct's `__post_init__`

    @property
    def param(self) -> str | None:
        """Name of the field with dots, as in errors of OpenAI's API; None for the whole value."""
        return ".".join(map(str, self.steps)) or None

    @property
    def path(self) -> str:
        """Path to the part in common notation: `a.b[1]`."""
        text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in self.steps)
        return text.removeprefix(".")

    def sentence(self, whole: str = "it") -> str:
        """Return the message without a full stop. `whole`: name of the whole value in it."""
        subject = f"`{self.path}`" if self.steps else whole
        if self.reason:
            return f"{subject}: {self.reason}" if self.steps else self.reason
        if self.missing:
            return f"{subject} is missing; it must be {self.allowed}"
        return f"{subject} must be {self.allowed}" + (f". Given: {self.given}" if self.given else "")


def misfit(value: Any, kind: Any, *, strict: bool = True) -> Misfit:
    """Find the part of `value` that does not fit `kind`. Call it after msgspec has refused the value.

    `value`: plain data, or well-formed JSON as `msgspec.Raw`, of which only the path to the part is decoded.
    """
    steps, kind, value = _innermost((), kind, value, strict)
    if isinstance(kind, _Absent):
        return Misfit(steps, _allowed(kind.kind), missing=True)
    if isinstance(value, msgspec.Raw) and not _fits(value, Any, strict):  # well-formed JSON that msgspec cannot decode
        if _form(value):
            return Misfit(steps, "a value without numbers that 64 bits cannot hold")
        return Misfit(steps, "a number that 64 bits can hold", shown(_text(value)))
    return Misfit(steps, _allowed(kind), _given(value), reason=_refusal(value, kind, strict))


def shown(value: object) -> str:
    """Format a value for a message, shortened if it is long."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = str(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


class _Absent(NamedTuple):
    kind: Any


_Part = tuple[tuple[str | int, ...], Any, Any]


def _innermost(steps: tuple[str | int, ...], kind: Any, value: Any, strict: bool) -> _Part:
    while True:
        kind = _chosen(kind, value)
        found = next((part for part in _parts(kind, _opened(value)) if not _fits(part[2], part[1], strict)), None)
        if found is None:
            return steps, kind, value
        step, kind, value = found
        steps = (*steps, step)
        if isinstance(kind, _Absent):
            return steps, kind, value


def _fits(value: Any, kind: Any, strict: bool) -> bool:
    if isinstance(kind, _Absent):
        return False
    try:
        _read(value, kind, strict)
    except (msgspec.DecodeError, RecursionError):  # a base class of ValidationError
        return False
    return True


def _read(value: Any, kind: Any, strict: bool) -> None:
    if isinstance(value, msgspec.Raw):
        msgspec.json.decode(value, type=kind, strict=strict)
    else:
        msgspec.convert(value, kind, strict=strict)


def _refusal(value: Any, kind: Any, strict: bool) -> str:
    """Return the message of a struct that refuses its fields although each of them fits."""
    try:
        _read(value, kind, strict)
    except msgspec.ValidationError as error:
        return str(error.__cause__) if type(error.__cause__) is ValueError else ""
    except (msgspec.DecodeError, RecursionError):
        pass
    return ""


def _chosen(kind: Any, value: Any) -> Any:
    """Return the only type of a union for objects or lists, if the value is an object or a list; else `kind`."""
    plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if get_origin(plain) not in _UNIONS:
        return plain if _is_compound(plain) else kind
    form = _form(value)
    fitting = [part for part in get_args(plain) if form in ("object", "list") and _form_of(part) == form]
    return _chosen(fitting[0], value) if len(fitting) == 1 else kind


def _parts(kind: Any, value: Any) -> Iterator[tuple[str | int, Any, Any]]:
    """Yield key or index, type and value of each part; the type is `_Absent` for a required field that is missing."""
    arguments = get_args(kind)
    if isinstance(value, dict) and _is_struct(kind):
        for field in msgspec.structs.fields(kind):
            if field.encode_name in value:
                yield field.encode_name, field.type, value[field.encode_name]
            elif field.required:
                yield field.encode_name, _Absent(field.type), None
    elif len(value) > _MAX_ITEMS if isinstance(value, dict | list | tuple) else True:
        return
    elif isinstance(value, dict) and get_origin(kind) is dict:
        yield from ((str(shown(key)), arguments[1], part) for key, part in value.items())
    elif isinstance(value, list | tuple) and get_origin(kind) in (list, tuple):
        every = get_origin(kind) is list or arguments[-1:] == (Ellipsis,)
        yield from ((i, arguments[0] if every else arguments[i], part)
                    for i, part in enumerate(value) if every or i < len(arguments))  # fmt: skip


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _is_compound(kind: Any) -> bool:
    return _form_of(kind) in ("object", "list")


def _form_of(kind: Any) -> str:
    plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    origin = get_origin(plain) or plain
    return "object" if origin is dict or _is_struct(plain) else "list" if origin in (list, tuple) else ""


def _form(value: Any) -> str:
    if isinstance(value, msgspec.Raw):
        return {"{": "object", "[": "list"}.get(_text(value)[:1], "")
    return "object" if isinstance(value, dict) else "list" if isinstance(value, list | tuple) else ""


def _opened(value: Any) -> Any:
    """Decode a JSON text by one level, to an object or a list of JSON texts; return any other value unchanged."""
    form = _form(value) if isinstance(value, msgspec.Raw) else ""
    if not form:
        return value
    try:
        kind: Any = dict[str, msgspec.Raw] if form == "object" else list[msgspec.Raw]
        return msgspec.json.decode(value, type=kind)
    except (msgspec.DecodeError, RecursionError):
        return value


def _given(value: Any) -> str:
    if _form(value):
        return ""
    read = msgspec.json.decode(value) if isinstance(value, msgspec.Raw) else value
    if read is None or isinstance(read, bool):
        return str(msgspec.json.encode(read), "ascii")
    return shown(read)


def _text(value: msgspec.Raw) -> str:
    return str(memoryview(value), "utf-8", "replace").strip()


def _allowed(kind: Any) -> str:
    return _words(inspect.type_info(kind))


def _words(kind: inspect.Type) -> str:
    if isinstance(kind, inspect.Metadata):
        return _words(kind.type)
    if isinstance(kind, inspect.UnionType):
        *most, last = dict.fromkeys(map(_words, kind.types))
        return f"{', '.join(most)}, or {last}" if most else last
    if isinstance(kind, inspect.LiteralType):
        return f"one of {', '.join(map(str, kind.values))}"
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        return _number("an integer" if isinstance(kind, inspect.IntType) else "a number", kind)
    if isinstance(kind, inspect.ListType | inspect.VarTupleType):
        many = _MANY.get(_words(kind.item_type).partition(",")[0])
        return f"a list of {many}" if many else "a list"
    if isinstance(kind, inspect.TupleType):
        return f"a list of {len(kind.item_types)} values"
    for form, words in _PLAIN:
        if isinstance(kind, form):
            return words
    return "something else"


_PLAIN: tuple[tuple[Any, str], ...] = (
    (inspect.StrType, "a string"),
    (inspect.BoolType, "true or false"),
    (inspect.NoneType, "null"),
    ((inspect.DictType, inspect.StructType), "an object"),
    ((inspect.AnyType, inspect.RawType), "any value"),
)


_MANY = {"a string": "strings", "an integer": "integers", "a number": "numbers", "an object": "objects",
         "a list": "lists"}  # fmt: skip


def _number(name: str, kind: inspect.IntType | inspect.FloatType) -> str:
    bounds = [f"{words} {bound:g}" for bound, words in (
        (kind.ge, "at least"), (kind.gt, "more than"), (kind.le, "at most"), (kind.lt, "less than"),
    ) if bound is not None]  # fmt: skip
    bounds += [f"a multiple of {kind.multiple_of:g}"] if kind.multiple_of is not None else []
    return f"{name}, {' and '.join(bounds)}" if bounds else name
