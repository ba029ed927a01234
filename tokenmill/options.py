"""Build a command line from a struct: each field defines an option and an environment variable.

For example, `port: Annotated[int, Option("Port to listen on.", at_most=65535)] = 3000` defines `--port` and `PORT`. The
command line takes precedence over the environment, which takes precedence over the default.
"""

from __future__ import annotations

import argparse
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import msgspec

from tokenmill.errors import ArgumentError, UsageError
from tokenmill.surroundings import is_service_link, stripped

_MOST = 2**63 - 1
_TRUE, _FALSE = ("true", "1", "yes", "y", "on", "t"), ("false", "0", "no", "n", "off", "f")


@dataclass(frozen=True, slots=True)
class Option:
    """Properties of an option beyond the type and default of its field."""

    help: str
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    at_most: float | None = None
    env: str | None = None  # variables, separated by commas, highest precedence first; None: FIELD_NAME; "": none
    short: str = ""
    secret: bool = False
    later: str = ""  # not implemented yet: a given value is refused with this sentence
    no_effect: str = ""  # reason why the option has no effect, logged if it is given
    env_only: bool = False
    shared_env: str = ""  # the variable that other programs read too, so an unreadable value is not an error


@dataclass(frozen=True, slots=True)
class Field:
    """Option to parse: its name, its plain type (bool, int, float, str or tuple) and its default."""

    name: str
    kind: type
    default: Any
    option: Option

    @property
    def flag(self) -> str:
        """Name on the command line, with its dashes."""
        return "--" + self.name.replace("_", "-")

    @property
    def variables(self) -> tuple[str, ...]:
        """Environment variables that set the option, highest precedence first."""
        names = self.name.upper() if self.option.env is None else self.option.env
        return tuple(name for name in names.split(",") if name)


def fields_of(struct: type[msgspec.Struct]) -> Iterator[Field]:
    """Yield the options that a struct's annotated fields define, in the order of the fields."""
    hints = typing.get_type_hints(struct, include_extras=True)
    for field in msgspec.structs.fields(struct):
        annotated = hints[field.name]
        plain, option = typing.get_args(annotated)[:2]
        if isinstance(plain, types.UnionType):  # X | None: None means "not given"
            plain = next(part for part in typing.get_args(plain) if part is not type(None))
        yield Field(field.name, typing.get_origin(plain) or plain, field.default, option)


def boolean(text: str) -> bool:
    """Parse a boolean as spelled in TGI's environment variables. Raises ValueError."""
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise ValueError(f"{text!r} is neither true nor false")


def value_of(field: Field, text: str) -> Any:
    """Parse the value of a field. Raises ValueError that names the allowed values."""
    option, kind = field.option, field.kind
    if kind is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if kind is bool:
        return boolean(text)
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{text!r} is not UTF-8")
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"{text!r} is not {'a whole number' if kind is int else 'a number'}") from None
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{text!r} is not a finite number")
    if kind is int and value > _MOST:
        raise ValueError(f"{text} is too large: at most {_MOST}")
    if option.choices and value not in option.choices:
        raise ValueError(f"{text!r} is not one of: {', '.join(option.choices)}")
    if option.at_least is not None and value < option.at_least:
        raise ValueError(f"{text} is too small: at least {option.at_least:g}")
    if option.at_most is not None and value > option.at_most:
        raise ValueError(f"{text} is too large: at most {option.at_most:g}")
    return value


class Parser(argparse.ArgumentParser):
    """Argument parser without abbreviations that suggests the nearest option for an unknown one."""

    def __init__(self, **keywords: Any) -> None:
        keywords.setdefault("formatter_class", _HelpFormatter)
        super().__init__(allow_abbrev=False, **keywords)

    def error(self, message: str) -> NoReturn:
        """Print a usage line and the message, and exit with status 2."""
        known = [flag for action in self._actions for flag in action.option_strings]
        if message.startswith("unrecognized arguments: "):
            wrong = message.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]
            near = difflib.get_close_matches(wrong, known, 1)
            message = f"unknown option {wrong}" + (f"; did you mean {near[0]}?" if near else "")
        self.exit(2, f"error: {message}\nTry '{self.prog} --help'.\n")


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=118)


def add_options(parser: argparse.ArgumentParser, struct: type[msgspec.Struct], *, flags: bool = False) -> None:
    """Add every option of `struct` to `parser`. An option that is not given sets no attribute; see `collect`.

    `flags`: True if booleans take no value and have a `--no-…` form, for commands whose positional argument may follow.
    """
    for field in fields_of(struct):
        if field.option.env_only:
            continue
        names = [field.flag] + ([field.option.short] if field.option.short else [])
        keywords: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": _help(field)}
        if field.kind is bool and flags:
            keywords |= {"action": argparse.BooleanOptionalAction}
        elif field.kind is bool:
            keywords |= {"nargs": "?", "const": True, "type": _typed(field), "metavar": "BOOL"}
        elif field.kind is tuple:
            keywords |= {"action": "extend", "type": _typed(field), "metavar": "VALUE"}
        else:
            keywords |= {"type": _typed(field), "metavar": field.kind.__name__.upper()}
        parser.add_argument(*names, **keywords)


def _typed(field: Field) -> Any:
    def parse(text: str) -> Any:
        try:
            return value_of(field, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def _help(field: Field) -> str:
    option = field.option
    notes = [f"one of {', '.join(option.choices)}"] if option.choices else []
    notes += [f"default {_text(field.default)}"] if field.default not in (None, "", (), False) else []
    notes += [f"env {field.variables[0]}"] if field.variables else []
    notes += ["not in this release"] if option.later else []
    text = option.help + (f" [{'; '.join(notes)}]" if notes else "")
    return text.replace("%", "%%")


def _text(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def collect(
    struct: type[msgspec.Struct], namespace: argparse.Namespace, environ: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the values given by command line or environment, and warnings about those without effect.

    Raises UsageError for an invalid value in the environment, ArgumentError for an option not implemented yet.
    """
    values: dict[str, Any] = {}
    warnings: list[str] = []
    for field in fields_of(struct):
        if hasattr(namespace, field.name):
            value, source = getattr(namespace, field.name), field.flag
            value = tuple(value) if field.kind is tuple else value
        else:
            found = _from_environment(field, environ, warnings)
            if found is None:
                continue
            value, source = found
        values[field.name] = value
        if value in (field.default, False):
            continue
        if field.option.later:
            raise ArgumentError(f"`{source}` cannot be used yet: {field.option.later}")
        if field.option.no_effect:
            warnings.append(f"`{source}` has no effect: {field.option.no_effect}")
    return values, warnings


def _from_environment(field: Field, environ: Mapping[str, str], warnings: list[str]) -> tuple[Any, str] | None:
    """Return the value of the first variable that is set, and the variable's name; None if none is set.

    Harmless oddities of a value are added to `warnings`. Raises UsageError for an unreadable value, unless the option
    has no effect or the variable is shared with other programs.
    """
    for variable in field.variables:
        given = environ.get(variable, "")
        text = stripped(given)
        if text != given:
            warnings.append(f"`{variable}`: white space or quotes around its value are taken to be no part of it.")
        if variable == field.option.shared_env:
            text = text.partition(",")[0]  # OMP_NUM_THREADS may hold one number per nesting level
        if not text:
            continue
        if field.kind not in (str, tuple) and is_service_link(text):
            warnings.append(f"`{variable}={text}` is ignored: it is the address of a service, not this option's value.")
            continue
        try:
            return value_of(field, text), variable
        except ValueError as error:
            if field.option.no_effect:
                warnings.append(f"`{variable}` has no effect: {field.option.no_effect} ({error})")
            elif variable == field.option.shared_env:
                warnings.append(f"`{variable}` is ignored: {error}.")
            else:
                raise UsageError(f"Environment variable {variable}: {error}.") from None
    return None
