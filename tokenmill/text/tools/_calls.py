"""A format as a record: the texts around calls, and the style in which one call is written.

Under the grammar of an answer there is text up to a trigger, then a group of calls, then text again; bare calls stand
at the answer's beginning. Text contains no trigger and does not begin as bare calls do, so nothing in it is read as
one.
"""

from __future__ import annotations

import secrets
import string
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, NamedTuple

from tokenmill.text.functions import Tool
from tokenmill.text.lark import Lark, quoted
from tokenmill.text.output import DeltaBuilder
from tokenmill.text.reader import Reading, TextCursor
from tokenmill.text.tools.base import GrammarRequest

_LETTERS = string.ascii_letters + string.digits


def random_id(length: int = 24, prefix: str = "call_") -> str:
    """Return a call's id that cannot be guessed."""
    return prefix + "".join(secrets.choice(_LETTERS) for _ in range(length))


class Bare(NamedTuple):
    """Calls without a mark. `group`: an expression for some of them; `head`: a regular expression for a beginning that
    no text has; `other`: an expression for text that begins so, but not with a function's name; `glue`: a regular
    expression for text between two calls, if nothing closes them."""

    group: str
    head: str
    other: str = ""
    glue: str = ""


class Style(ABC):
    """Way of writing calls between a format's marks. `has_trigger`: each call has the format's trigger before it,
    whatever else precedes it."""

    has_trigger: ClassVar[bool] = False

    @abstractmethod
    def read(self, form: Calls, r: TextCursor, out: DeltaBuilder) -> Reading[None]:
        """See ToolFormat."""

    @abstractmethod
    def write(self, lark: Lark, rule: str, tool: Tool, request: GrammarRequest) -> str:
        """Return the body of a rule for one call. `rule`: its name, which is no prefix of another name."""

    def beside_json(self, lark: Lark, rule: str, tool: Tool, request: GrammarRequest) -> str:
        """Return `write` for a call without a mark where other JSON may stand instead: it must have the same
        lexemes."""
        return self.write(lark, rule, tool, request)

    def bare(self, form: Calls, lark: Lark, request: GrammarRequest) -> Bare:
        """Return calls without a mark, for formats that have such. `call` is a rule for any that follows another, and
        no text contains the first characters of `triggers`."""
        raise AssertionError(f"{form.name} has no calls without a mark")


@dataclass(frozen=True, kw_only=True)
class Calls:
    """A format. `opening`, `between` and `closing`: texts that the model is made to write around one call or several;
    `trigger`: the part of `opening` that distinguishes calls from text. `starts` and `ends`: all texts that are
    understood around them."""

    name: str
    matches: Callable[[str], bool]
    style: Style
    opening: str
    between: str
    closing: str = ""
    trigger: str = ""
    starts: tuple[str, ...]
    ends: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()  # marks inside of calls
    aliases: tuple[str, ...] = ()
    bare: str = ""
    known: bool = False  # marks do not prove a call: only functions that exist are called
    new_id: Callable[[], str] = field(default=random_id)
    own_loop: bool = False

    @cached_property
    def markers(self) -> tuple[str, ...]:
        """Texts that may be special tokens."""
        return (*self.starts, *self.ends, *self.extra)

    @cached_property
    def triggers(self) -> tuple[str, ...]:
        """Texts of which one precedes each group of calls that a grammar allows, except bare ones."""
        return (self.trigger,) if self.trigger else self.starts

    @cached_property
    def held_starts(self) -> tuple[str, ...]:
        """See ToolFormat."""
        return self.starts if self.style.has_trigger else self.triggers

    def read(self, r: TextCursor, out: DeltaBuilder) -> Reading[None]:
        """See ToolFormat."""
        return self.style.read(self, r, out)

    def grammar(self, request: GrammarRequest) -> str:
        """See ToolFormat."""
        lark = Lark(request.special_ids)
        write = self.style.beside_json if self.bare and request.extent == "choice" else self.style.write
        names = [f"call_{i}" for i in range(len(request.tools))]
        rules = [lark.rule(n, write(lark, n, tool, request)) for n, tool in zip(names, request.tools, strict=True)]
        lark.rule("call", " | ".join(rules))
        if request.extent in ("calls", "choice"):
            lark.rule("start", self._group(lark, request, self.opening) + (" | instead" * bool(request.instead)))
        else:
            self._write_answer(lark, request)
        return lark.source() + request.instead

    def _group(self, lark: Lark, request: GrammarRequest, opening: str) -> str:
        """Return calls that begin with `opening`. If text may follow them, the text that closes a call does not open
        another, because the lexer would have to distinguish the two."""
        apart = request.extent in ("answer", "behind") and self.closing and self.between.startswith(self.closing)
        many = f"call ({lark.text(self.between)} call)*" if request.parallel and not apart else "call"
        return f"{lark.text(opening)} {many} {lark.text(self.closing)}".strip()

    def _write_answer(self, lark: Lark, request: GrammarRequest) -> None:
        """Write the rules of text and calls."""
        free = lark.free("free", self.triggers, (*request.spoken, *self.markers))
        triggers = " | ".join(map(lark.text, self.triggers))
        opening = self.opening.partition(self.trigger)[2] if self.trigger else self.opening
        group, plain, begin = self._group(lark, request, opening), free.plain, free.plain
        if self.bare:
            bare = self.style.bare(self, lark, request)
            if bare.glue:
                plain = lark.rule("BEHIND", f"{free.plain} & ~/{bare.glue}(?s:.*)/")
            first = lark.rule("FIRST", f"{free.plain} & ~/{bare.head}(?s:.*)/")
            begin = " | ".join(filter(None, (f"({bare.group}) {plain}?", bare.other, first)))
        triggered = lark.rule("triggered", f"({begin})?" if self.known else f"{group} {plain}?")
        lark.rule("item", f"{free.more} | ({triggers}) {triggered}")
        lark.rule("start", f"{triggered} item*" if request.extent == "behind" else f"({begin})? item*")


def entries(firm: Sequence[str], loose: Sequence[str], between: str) -> str:
    """Return an expression for entries of an object in their order: all of `firm`, any of `loose`."""
    join = f" {quoted(between)} "
    options = ["".join(f" ({join}{later})?" for later in loose[i:]) for i in range(len(loose) + 1)]
    if firm:
        return join.join(firm) + options[0]
    first = " | ".join(part + options[i + 1] for i, part in enumerate(loose))
    return f"({first})?" if first else ""
