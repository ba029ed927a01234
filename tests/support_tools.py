"""Writers of tool calls in the format of each model: the inverse of the parsers in `text/tools`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from tokenmill.text.router import Router, format_of, new_router
from tokenmill.text.tools import by_name
from tokenmill.text.tools._xml_style import XmlStyle

Call = tuple[str, dict[str, Any]]


def cut(whole: str, places: list[int]) -> list[str]:
    """Cut `whole` into pieces."""
    edges = [0, *sorted(place % (len(whole) + 1) for place in places), len(whole)]
    return [whole[a:b] for a, b in pairwise(edges)]


def text_of(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def objects(calls: list[Call], name: str = "name", arguments: str = "arguments") -> list[str]:
    return [f'{{"{name}": {text_of(called)}, "{arguments}": {text_of(given)}}}' for called, given in calls]


def hermes(calls: list[Call]) -> str:
    return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects(calls))


def smollm(calls: list[Call]) -> str:
    return f"<tool_call>[{', '.join(objects(calls))}]</tool_call>"


def llama(calls: list[Call]) -> str:
    return "; ".join(objects(calls, arguments="parameters"))


def generic(calls: list[Call]) -> str:
    return f"[{', '.join(objects(calls))}]"


def mistral(calls: list[Call]) -> str:
    return f"[TOOL_CALLS][{', '.join(objects(calls))}]"


def mistral_args(calls: list[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{text_of(given)}" for name, given in calls)


def deepseek(calls: list[Call]) -> str:
    written = [
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{text_of(given)}\n```<｜tool▁call▁end｜>"
        for name, given in calls
    ]
    return "<｜tool▁calls▁begin｜>" + "\n".join(written) + "<｜tool▁calls▁end｜>"


def deepseek_v31(calls: list[Call]) -> str:
    written = [f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{text_of(given)}<｜tool▁call▁end｜>" for name, given in calls]
    return "<｜tool▁calls▁begin｜>" + "".join(written) + "<｜tool▁calls▁end｜>"


def kimi(calls: list[Call]) -> str:
    written = [
        f"<|tool_call_begin|>functions.{name}:{i}<|tool_call_argument_begin|>{text_of(given)}<|tool_call_end|>"
        for i, (name, given) in enumerate(calls)
    ]
    return "<|tool_calls_section_begin|>" + "".join(written) + "<|tool_calls_section_end|>"


def plain(value: Any) -> str:
    return value if isinstance(value, str) else text_of(value)


def tagged(calls: list[Call], mark: str, line: str) -> str:
    """Write a call with Qwen3-Coder's tags. `line`: text on both sides of a value."""
    written = []
    for name, given in calls:
        tags = "".join(f"<parameter={key}>{line}{plain(value)}{line}</parameter>\n" for key, value in given.items())
        written.append(f"<{mark}>\n<function={name}>\n{tags}</function>\n</{mark}>")
    return "\n".join(written)


def qwen3_coder(calls: list[Call]) -> str:
    return tagged(calls, "tool_call", "\n")


def seed_oss(calls: list[Call]) -> str:
    return tagged(calls, "seed:tool_call", "")


def minimax(calls: list[Call]) -> str:
    written = "".join(
        f'<invoke name="{name}">\n'
        + "".join(f'<parameter name="{key}">{plain(value)}</parameter>\n' for key, value in given.items())
        + "</invoke>\n"
        for name, given in calls
    )
    return f"<minimax:tool_call>\n{written}</minimax:tool_call>"


def nemotron(calls: list[Call]) -> str:
    return f"<TOOLCALL>[{', '.join(objects(calls))}]</TOOLCALL>"


def glm(calls: list[Call]) -> str:
    written = []
    for name, given in calls:
        tags = "".join(
            f"<arg_key>{key}</arg_key>\n<arg_value>{plain(value)}</arg_value>\n" for key, value in given.items()
        )
        written.append(f"<tool_call>{name}\n{tags}</tool_call>")
    return "\n".join(written)


def phi4(calls: list[Call]) -> str:
    return f"<|tool_call|>[{', '.join(objects(calls))}]<|/tool_call|>"


def granite(calls: list[Call]) -> str:
    return f"<|tool_call|>[{', '.join(objects(calls))}]"


def command_r(calls: list[Call]) -> str:
    written = ",\n    ".join(
        f'{{"tool_call_id": "{i}", {one[1:]}' for i, one in enumerate(objects(calls, "tool_name", "parameters"))
    )
    return f"<|START_ACTION|>[\n    {written}\n]<|END_ACTION|>"


def python_calls(calls: list[Call]) -> list[str]:
    return [f"{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})" for name, given in calls]


def pythonic(calls: list[Call]) -> str:
    return f"[{', '.join(python_calls(calls))}]"


def lfm2(calls: list[Call]) -> str:
    return f"<|tool_call_start|>[{', '.join(python_calls(calls))}]<|tool_call_end|>"


def gemma(calls: list[Call]) -> str:
    return "```tool_code\n" + "\n".join(python_calls(calls)) + "\n```"


def escaped_key(key: str) -> str:
    return key if key.isidentifier() else f"<escape>{key}<escape>"


def escaped(value: Any) -> str:
    if isinstance(value, str):
        return f"<escape>{value}<escape>"
    if isinstance(value, dict):
        return "{" + ",".join(f"{escaped_key(key)}:{escaped(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return f"[{','.join(map(escaped, value))}]"
    return text_of(value)


def functiongemma(calls: list[Call]) -> str:
    return "".join(
        f"<start_function_call>call:{name}{{{','.join(f'{key}:{escaped(value)}' for key, value in given.items())}}}"
        f"<end_function_call>"
        for name, given in calls
    )


def harmony(calls: list[Call]) -> str:
    return "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{text_of(given)}<|call|>"
        for name, given in calls
    )


WRITERS: dict[str, Callable[[list[Call]], str]] = {
    writer.__name__: writer
    for writer in (
        hermes, smollm, llama, generic, mistral, mistral_args, deepseek, deepseek_v31, kimi, qwen3_coder, glm, phi4,
        granite, command_r, pythonic, gemma, functiongemma, harmony, seed_oss, minimax, nemotron, lfm2,
    )
}  # fmt: skip
UNLIKE = ("hermes", "llama", "mistral", "qwen3_coder", "pythonic", "gemma", "harmony")
"""A format of each style: JSON in marks, bare or headed, XML, Python, escaped texts, channels."""
BARE = {"llama", "generic", "pythonic"}
"""Formats whose calls are the whole answer."""


def marks_of(name: str) -> list[str]:
    """Return the marks of a format, and texts that look like them or like their surroundings."""
    form = by_name(name)
    style = getattr(form, "style", None)
    inner: list[str] = []
    if isinstance(style, XmlStyle):
        another = f"{style.key}other{style.key_end}"
        inner = [style.head, style.head_end, another, style.value, style.value_end, style.body_end]
    found = [*form.markers, *form.starts, *inner, "</tool_call>", "```", '"""', "'''"]
    others = ['{"name": "now", "arguments": {}}', "now(a=1)", "null", "1", "\\n", "é", "日", "😀", "\u2028"]
    return [*dict.fromkeys(filter(None, found)), *others, *"{}[]()\"',:=\\\n <>"]


def ambiguous(name: str, made: list[Call]) -> bool:
    """Return True for calls that a format cannot express, by the rule in the docstring of its style."""
    form = by_name(name)
    style = getattr(form, "style", None)
    if name == "functiongemma":
        return any(re.search(r"<escape>\s*[,:)\]}]", text) for text in texts_in([given for _, given in made]))
    if not isinstance(style, XmlStyle):
        return False
    end, starts = form.ends[0], "|".join(map(re.escape, form.starts))
    finish = style.body_end or end
    tags = "|".join(map(re.escape, (style.key, finish, end, *form.starts)))
    closed = rf"{re.escape(style.value_end)}\s*({tags})|{re.escape(end)}\s*({starts})"
    finished = rf"{re.escape(finish)}\s*({re.escape(end)}|{starts})"
    plain_texts = [value for _, given in made for value in given.values() if isinstance(value, str)]
    return any(re.search(f"{closed}|{finished}", text) for text in plain_texts)


def texts_in(value: Any) -> list[str]:
    """Yield all texts in a value, keys included."""
    if isinstance(value, dict):
        return [text for key, inner in value.items() for text in (key, *texts_in(inner))]
    if isinstance(value, list):
        return [text for inner in value for text in texts_in(inner)]
    return [value] if isinstance(value, str) else []


def router_of(template: str, *, parser: str = "", **more: Any) -> Router:
    """Return the router of an answer, with the format of calls named by a parser or implied by the template."""
    return new_router(format_of(template, parser), **more)
