"""Grammars as clients send them, in the words of several APIs, made into one `GrammarSpec`.

Every function takes decoded JSON and the name of the field it came from, and raises GrammarError with that name. What
is checked here needs no library and little time, so a server may do it where it reads requests; whether the grammar
compiles is the pool's to say.
"""

from __future__ import annotations

import json
from typing import Any

from tokenmill.errors import GrammarError
from tokenmill.grammar import schema
from tokenmill.grammar.patterns import PatternError, rewrite
from tokenmill.wire.messages import GrammarSpec

MAX_GRAMMAR_BYTES = 256 << 10
MAX_CHOICES = 10_000

_ANY_OBJECT = {"type": "object"}
_STRUCTURED = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")


def json_schema(value: Any, param: str) -> GrammarSpec:
    """A JSON schema: an object, true, or text that holds one."""
    if isinstance(value, str):
        value = schema.decode(value, param)
    if not isinstance(value, dict | bool):
        raise GrammarError("A JSON schema is an object, or a string that holds one.", param)
    return GrammarSpec("json_schema", schema.canonical(value, param))


def json_object() -> GrammarSpec:
    """Any JSON object."""
    return GrammarSpec("json_schema", schema.canonical(_ANY_OBJECT))


def regex(value: Any, param: str) -> GrammarSpec:
    """A regular expression that the whole answer matches."""
    if not isinstance(value, str):
        raise GrammarError("A regular expression is a string.", param)
    try:
        rewrite(value, search=False)
    except PatternError as error:
        raise GrammarError(f"The regular expression cannot be used: {error}.", param) from None
    return GrammarSpec("regex", _text(value, param))


def choice(value: Any, param: str) -> GrammarSpec:
    """A list of strings, one of which is the answer."""
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise GrammarError("The choices are a list of strings that is not empty.", param)
    if len(value) > MAX_CHOICES:
        raise GrammarError(f"{len(value)} choices are given; at most {MAX_CHOICES} are allowed.", param)
    return GrammarSpec("choice", _text(json.dumps(list(dict.fromkeys(value)), ensure_ascii=False), param))


def grammar(value: Any, param: str) -> GrammarSpec:
    """A context-free grammar, in Lark's syntax or in the EBNF of llama.cpp and xgrammar (`root ::= …`)."""
    if not isinstance(value, str) or not value.strip():
        raise GrammarError("A grammar is a string that is not empty.", param)
    text = _text(value, param)
    return GrammarSpec("lark", _lark_of_ebnf(text, param) if "::=" in text else text)


def response_format(value: Any, param: str = "response_format") -> GrammarSpec | None:
    """OpenAI's `text`, `json_object` and `json_schema`, and TGI's three kinds with `value`. None: any text."""
    if value is None:
        return None
    kind = _kind(value, param)
    if kind == "text":
        return None
    if kind == "json_schema" and "json_schema" in value:
        inner = value["json_schema"]
        if not isinstance(inner, dict) or not isinstance(inner.get("schema", {}), dict | bool | str):
            raise GrammarError("`json_schema` is an object with a `schema`.", f"{param}.json_schema")
        if "schema" not in inner:  # OpenAI: a name alone asks for any object
            return json_object()
        return json_schema(inner["schema"], f"{param}.json_schema.schema")
    if kind == "json_object" and value.get("value") is None:
        schema_given = value.get("schema")  # llama.cpp's and Together's spelling
        return json_object() if schema_given is None else json_schema(schema_given, f"{param}.schema")
    return native(value, param)


def native(value: Any, param: str = "grammar") -> GrammarSpec | None:
    """TGI's `grammar`: {"type": "json" | "json_object" | "regex" | "json_schema", "value": …}. None: any text."""
    if value is None:
        return None
    kind = _kind(value, param)
    if "value" not in value:
        raise GrammarError(f"A grammar of the type {kind!r} needs a `value`.", f"{param}.value")
    given, where = value["value"], f"{param}.value"
    if kind in ("json", "json_object"):
        return json_schema(given, where)
    if kind == "regex":
        return regex(given, where)
    if kind == "json_schema":
        if not isinstance(given, dict) or "schema" not in given:
            raise GrammarError("The value of a `json_schema` is an object with a `schema`.", where)
        return json_schema(given["schema"], f"{where}.schema")
    raise GrammarError(f"The type {kind!r} is not supported. Supported: json, json_object, json_schema, regex.",
                       f"{param}.type")  # fmt: skip


def guided(fields: dict[str, Any]) -> GrammarSpec | None:
    """vLLM's `guided_json`, `guided_regex`, `guided_choice`, `guided_grammar` and `structured_outputs`, by name.

    None if none of them is set. GrammarError if several are.
    """
    inner = fields.get("structured_outputs")
    given = [(name, name.removeprefix("guided_"), fields[name]) for name in _GUIDED if fields.get(name) is not None]
    if inner is not None:
        if not isinstance(inner, dict):
            raise GrammarError("`structured_outputs` is an object.", "structured_outputs")
        given += [(f"structured_outputs.{name}", name, inner[name]) for name in _STRUCTURED
                  if inner.get(name) not in (None, False)]  # fmt: skip
    if len(given) > 1:
        raise GrammarError(f"Only one of {', '.join(name for name, _, _ in given)} can be given.", given[1][0])
    if not given:
        return None
    param, kind, value = given[0]
    if kind == "structural_tag":
        raise GrammarError("`structural_tag` is not supported; use `tools` with strict schemas, or a grammar.", param)
    if kind == "json_object":
        return json_object()
    return {"json": json_schema, "regex": regex, "choice": choice, "grammar": grammar}[kind](value, param)


def _kind(value: Any, param: str) -> str:
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise GrammarError(f"`{param}` is an object with a `type`.", param)
    return str(value["type"])


def _text(value: str, param: str) -> str:
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise GrammarError("The grammar has characters that cannot be written in UTF-8.", param) from None
    if size > MAX_GRAMMAR_BYTES:
        raise GrammarError(f"The grammar takes {size} bytes; at most {MAX_GRAMMAR_BYTES} are allowed.", param)
    return value


def _lark_of_ebnf(text: str, param: str) -> str:
    from llguidance.gbnf_to_lark import any_to_lark

    if text.count("(") > 200 * text.count("::=") + 200:
        raise GrammarError("The grammar's groups are nested too deeply.", param)
    try:
        return str(any_to_lark(text))
    except RecursionError:
        raise GrammarError("The grammar's groups are nested too deeply.", param) from None
    except Exception as error:  # noqa: BLE001 - the converter raises its own and plain exceptions alike
        raise GrammarError(f"The grammar cannot be read: {str(error)[:300]}.", param) from None
