"""Mistral: [TOOL_CALLS] and a list of JSON objects, or, since its eleventh tokenizer, [TOOL_CALLS]name[ARGS]{…}.

Both formats read either form; they differ in what the model is made to write.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tokenmill.text.tools._headed import HeadedCalls
from tokenmill.text.tools._jsoncalls import JsonCalls, random_id
from tokenmill.text.tools._output import Output
from tokenmill.text.tools._reader import Reader, Reading, expect, peek, spaces, take, word

_START, _ID, _ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_NAME = re.compile(r"[\w.:/\-]+")


def matches(template: str) -> bool:
    """True for templates of the list form."""
    return _START in template and _ARGS not in template


def matches_args(template: str) -> bool:
    """True for templates of the newer form."""
    return _START in template and _ARGS in template


def new_id() -> str:
    """Nine letters and digits: Mistral's templates refuse anything else."""
    return random_id(9, "")


def read_head(r: Reader) -> Reading[tuple[str, str | None]]:
    """name, [CALL_ID]id if there is one, [ARGS] or the arguments at once."""
    name = yield from word(r, _NAME)
    call_id: str | None = None
    if (yield from take(r, _ID)):
        call_id = yield from word(r, _NAME)
    yield from take(r, _ARGS)
    yield from spaces(r)
    return name, call_id


def _read(r: Reader, out: Output) -> Reading[None]:
    """What follows the first marker tells the form."""
    yield from spaces(r)
    yield from expect(r, _START)
    yield from spaces(r)
    if (yield from peek(r)) in ("[", "{"):
        yield from FORMAT.read_calls(r, out, known=False)
    else:
        yield from ARGS.read_calls(r, out)


@dataclass(frozen=True)
class _Listed(JsonCalls):
    markers = (_START, _ID, _ARGS)

    def read(self, r: Reader, out: Output) -> Reading[None]:
        yield from _read(r, out)


@dataclass(frozen=True)
class _Headed(HeadedCalls):
    def read(self, r: Reader, out: Output) -> Reading[None]:
        yield from _read(r, out)


FORMAT = _Listed(
    name="mistral",
    matches=matches,
    opening=f"{_START}[",
    between=", ",
    closing="]",
    trigger=_START,
    starts=(_START,),
    new_id=new_id,
)
ARGS = _Headed(
    name="mistral_args",
    matches=matches_args,
    aliases=("mistral_v11", "mistral_v13"),
    head=read_head,
    begin=_START,
    written=f"{{name}}{_ARGS}",
    extra=(_ID, _ARGS),
    new_id=new_id,
)
