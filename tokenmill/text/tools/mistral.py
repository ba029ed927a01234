"""Mistral: [TOOL_CALLS] and a list of JSON objects, or, since its eleventh tokenizer, [TOOL_CALLS]name[ARGS]{…}.

Both formats read either form. They differ in the form that the model is made to write.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

from tokenmill.text.output import DeltaBuilder
from tokenmill.text.reader import Reading, TextCursor, expect, peek, spaces, take, word
from tokenmill.text.tools._calls import Calls, random_id
from tokenmill.text.tools._headed_style import HeadedStyle
from tokenmill.text.tools._json_style import JsonStyle

_START, _ID, _ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_END = "[/TOOL_CALLS]"  # of some fine-tuned models
_NAME = re.compile(r"[\w.:/\-]+")
new_id = partial(random_id, 9, "")  # nine letters and digits, because Mistral's templates refuse others


def matches(template: str) -> bool:
    """Return True for templates of the list form."""
    return _START in template and _ARGS not in template


def matches_args(template: str) -> bool:
    """Return True for templates of the newer form."""
    return _START in template and _ARGS in template


def read_head(r: TextCursor) -> Reading[tuple[str, str | None]]:
    """Read name, [CALL_ID]id if there is one, and [ARGS] or the arguments at once."""
    name = yield from word(r, _NAME)
    call_id: str | None = None
    if (yield from take(r, _ID)):
        call_id = yield from word(r, _NAME)
    yield from take(r, _ARGS)
    yield from spaces(r)
    return name, call_id


def _read(form: Calls, r: TextCursor, out: DeltaBuilder) -> Reading[None]:
    """Read calls of either form, which the text behind the first marker shows."""
    yield from spaces(r)
    yield from expect(r, _START)
    yield from spaces(r)
    if (yield from peek(r)) in ("[", "{"):
        yield from _LISTED.read_calls(form, r, out, known=False)
    else:
        yield from _HEADED.read_calls(form, r, out)


@dataclass(frozen=True)
class _Listed(JsonStyle):
    def read(self, form: Calls, r: TextCursor, out: DeltaBuilder) -> Reading[None]:
        yield from _read(form, r, out)


@dataclass(frozen=True)
class _Headed(HeadedStyle):
    def read(self, form: Calls, r: TextCursor, out: DeltaBuilder) -> Reading[None]:
        yield from _read(form, r, out)


_LISTED, _HEADED = _Listed(), _Headed(head=read_head, written=f"{{name}}{_ARGS}")
FORMAT = Calls(
    name="mistral",
    matches=matches,
    style=_LISTED,
    opening=f"{_START}[",
    between=", ",
    closing="]",
    trigger=_START,
    starts=(_START,),
    ends=(_END,),
    extra=(_ID, _ARGS),
    new_id=new_id,
)
ARGS = Calls(
    name="mistral_args",
    matches=matches_args,
    style=_HEADED,
    aliases=("mistral_v11", "mistral_v13"),
    opening=_START,
    between=_START,
    trigger=_START,
    starts=(_START,),
    ends=(_END,),
    extra=(_ID, _ARGS),
    new_id=new_id,
)
