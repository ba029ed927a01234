"""Ids of tool calls in a conversation, in the form that a template requires.

Clients bring calls of other providers into a conversation, with ids of other forms. For a template that requires a
form, ids of it are derived from the conversation up to the call, so the beginning of the prompt is the same in every
turn.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

IdForm = Literal["any", "short", "counted"]
"""`short`: nine letters and digits, as Mistral's templates demand. `counted`: functions.name:0, for Kimi's, which write
nothing else of a call's name."""

_LETTERS = string.ascii_letters + string.digits
_SHORT = re.compile(r"[a-zA-Z0-9]{9}")
_COUNTED = re.compile(r"functions\.(.+):\d+")


def renamed(messages: Sequence[dict[str, Any]], form: IdForm) -> list[dict[str, Any]]:
    """Return the messages with ids of that form, in calls and in their results alike. The arguments are not changed.

    An id that has the form already is kept. If a later call has the same id again, the id means that call from there
    on. A call without an id gets one, and so does the first result without one.
    """
    if form == "any":
        return list(messages)
    short = _short(messages) if form == "short" else {}
    now: dict[str, str] = {}  # new ids by old ones
    waiting: list[str] = []  # old ids of calls that have no result yet
    number = 0
    made = []
    for message in messages:
        if "tool_calls" in message:
            calls, waiting = [], []
            for call in message["tool_calls"]:
                if (name := _name_of(call)) is not None:
                    old = _old(call, number)
                    now[old] = short[old] if form == "short" else _counted(old, name, number)
                    call = {**call, "id": now[old]}
                    waiting.append(old)
                    number += 1
                calls.append(call)
            message = {**message, "tool_calls": calls}
        elif message.get("role") == "tool":
            old = message.get("tool_call_id") or next(iter(waiting), "")
            waiting = [one for one in waiting if one != old]
            message = {**message, "tool_call_id": now[old]} if old in now else message
        made.append(message)
    return made


def _short(messages: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return new ids by old ones. A new id depends on the old one alone, unless two new ones would be equal."""
    old = dict.fromkeys(_ids(messages))
    taken = {call_id for call_id in old if _SHORT.fullmatch(call_id)}
    made: dict[str, str] = {}
    for call_id in old:
        new, salt = call_id, ""
        while not _SHORT.fullmatch(new) or (new in taken and new != call_id):
            new, salt = _digest(salt + call_id), salt + " "
        taken.add(new)
        made[call_id] = new
    return made


def _counted(call_id: str, name: str, number: int) -> str:
    found = _COUNTED.fullmatch(call_id)
    return call_id if found and found[1] == name else f"functions.{name}:{number}"


def _ids(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    calls = (call for message in messages for call in message.get("tool_calls", ()) if _name_of(call) is not None)
    return (_old(call, number) for number, call in enumerate(calls))


def _old(call: Mapping[str, Any], number: int) -> str:
    """Return a call's id as its client sent it; one made of its number if it has none."""
    return str(call.get("id") or f"call {number}")


def _name_of(call: Any) -> str | None:
    """Return the function's name; None if the value is not a call."""
    function = call.get("function") if isinstance(call, Mapping) else None
    return str(function.get("name")) if isinstance(function, Mapping) else None


def _digest(text: str) -> str:
    """Return nine letters and digits that are the digest of a text."""
    number, letters = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()), []
    for _ in range(9):
        number, place = divmod(number, len(_LETTERS))
        letters.append(_LETTERS[place])
    return "".join(letters)
