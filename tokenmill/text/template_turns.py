"""Turns of a conversation, for templates that take fewer kinds of them than OpenAI's API has.

Nothing of a conversation is left out: a message that a template would not write is spread over several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Messages = Sequence[dict[str, Any]]


def one_by_one(messages: Messages) -> list[dict[str, Any]]:
    """Return the messages with one call in each, every call followed by its own results."""
    made: list[dict[str, Any]] = []
    at = 0
    while at < len(messages):
        message, at = messages[at], at + 1
        calls = message.get("tool_calls") or []
        if len(calls) < 2:
            made.append(message)
            continue
        results = []
        while at < len(messages) and messages[at].get("role") == "tool":
            results.append(messages[at])
            at += 1
        for i, call in enumerate(calls):
            bare = {"role": message["role"], "content": None if message.get("content") is None else ""}
            made.append({**(bare if i else message), "tool_calls": [call]})
            found = [one for one in results if one.get("tool_call_id") == call.get("id")]
            found = results if i == len(calls) - 1 else found
            made += found
            results = [one for one in results if one not in found]
    return made


def apart(messages: Messages, empty: str | None) -> list[dict[str, Any]]:
    """Return the messages with calls only beside an empty content: a text before calls becomes a message of its own.
    `empty`: the content beside calls."""
    made: list[dict[str, Any]] = []
    for message in messages:
        if message.get("tool_calls") and message.get("content"):
            made.append({key: value for key, value in message.items() if key != "tool_calls"})
            message = {"role": message["role"], "tool_calls": message["tool_calls"]}
        made.append({**message, "content": empty} if message.get("tool_calls") else message)
    return made


def results_as_user(messages: Messages) -> list[dict[str, Any]]:
    """Return the messages with results of tools as messages of the user, joined with adjacent ones, because templates
    without tools require alternating turns."""
    made: list[dict[str, Any]] = []
    open_turn = False  # the newest message is the user's, and has a result
    for message in messages:
        is_result = message.get("role") == "tool"
        if is_result:
            message = {"role": "user", "content": message.get("content") or ""}
        is_users = message.get("role") == "user"
        if is_users and made and made[-1].get("role") == "user" and (is_result or open_turn):
            made[-1] = {**made[-1], "content": _together(made[-1].get("content"), message.get("content"))}
        else:
            made.append(message)
        open_turn = is_users and (is_result or (open_turn and made[-1] is not message))
    return made


def _together(first: Any, second: Any) -> Any:
    """Return two contents, texts or lists of parts, as one."""
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n{second}"
    parts = [[{"type": "text", "text": one}] if isinstance(one, str) else list(one or ()) for one in (first, second)]
    return [*parts[0], {"type": "text", "text": "\n"}, *parts[1]]
