"""Translation of a request's grammar fields, in all accepted spellings, into one `GrammarSpec`.

TGI's `grammar` and `response_format` are `{"type", "value"}`; OpenAI's `response_format` has a key named after the
type; clients of vLLM send `guided_json` and its like, or `structured_outputs`. Malformed fields, and schemas that
cannot be served exactly, are refused here; other faults of a grammar are found when it is compiled. `limits.py` has
checked the size of each field before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from tokenmill.errors import GrammarError, ValidationError
from tokenmill.grammar import schema as schemas
from tokenmill.text.limits import GRAMMAR_FIELDS, MAX_CHOICES, shown
from tokenmill.wire.messages import GrammarSpec

KINDS = ("json", "json_object", "regex", "json_schema")
_ANY_OBJECT: dict[str, Any] = {"type": "object"}
_STRUCTURED = ("json", "regex", "choice", "grammar", "json_object")


def native_grammar(given: Any) -> GrammarSpec:
    """Translate the field `grammar` of the native routes. Raises ValidationError with TGI's messages."""
    kind = given.get("type") if isinstance(given, dict) else None
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise _not_valid(f"`type` must be one of {known}. Given: {shown(kind)}")
    if "value" not in given:
        raise _not_valid("`value` is missing")
    value = given["value"]
    if kind == "json_schema":
        if not isinstance(value, dict) or "schema" not in value:
            raise _not_valid("`value` must have a `schema`")
        value = value["schema"]
    if not isinstance(value, str if kind == "regex" else str | dict | bool):
        raise GrammarError("grammar is not supported", "grammar")
    try:
        if kind == "regex":
            return GrammarSpec("regex", _utf8(value, "grammar"))
        return json_grammar(value, "grammar")
    except GrammarError as error:
        raise _not_valid(str(error)) from None


class RequestedGrammar(NamedTuple):
    """A grammar requested on OpenAI's routes, and the field that contains it."""

    field: str
    grammar: GrammarSpec


def openai_grammar(given: Mapping[str, Any]) -> RequestedGrammar | None:
    """Translate the grammar fields of a request on OpenAI's routes; None if there is no grammar.

    Raises ValidationError if there are several grammars, or one is malformed.

    given: the request's fields by name; only `GRAMMAR_FIELDS` are read.
    """
    found: list[RequestedGrammar] = []
    for field in GRAMMAR_FIELDS:
        value = given.get(field)
        if value is None:
            continue
        if field == "response_format":
            grammar = _response_format(value)
        elif field == "structured_outputs":
            grammar = _structured(value)
        else:
            grammar = _of_kind(field.removeprefix("guided_"), value, field)
        if grammar is not None:
            found.append(RequestedGrammar(field, grammar))
    if len(found) > 1:
        names = ", ".join(f"`{requested.field}`" for requested in found)
        raise ValidationError(f"An answer can follow one grammar only. Given: {names}", found[1].field)
    return found[0] if found else None


def _response_format(given: Mapping[str, Any]) -> GrammarSpec | None:
    """Translate `response_format`; None for plain text."""
    kind = given.get("type")
    if not isinstance(kind, str):
        raise ValidationError("Invalid 'response_format': it must have a `type`", "response_format")
    if kind == "text":
        return None
    if kind in ("json_object", "json"):
        value = given.get("value", given.get("schema"))
        if value is None and kind == "json":
            raise _invalid("response_format.value", "it must be a JSON schema")
        return json_grammar(_ANY_OBJECT if value is None else value, "response_format")
    if kind == "json_schema":
        wrapped = given.get("json_schema", given.get("value"))
        schema = wrapped.get("schema") if isinstance(wrapped, dict) else None
        if schema is None and not (isinstance(wrapped, dict) and isinstance(wrapped.get("name"), str)):
            raise _invalid("response_format.json_schema", "it must have a `schema`")
        return json_grammar(_ANY_OBJECT if schema is None else schema, "response_format")  # a name is enough
    if kind == "regex":
        return _regex(given.get("value"), "response_format.value")
    known = "text, json_object, json_schema, json, regex"
    raise _invalid("response_format", f"its type must be one of {known}. Given: {shown(kind)!r}")


def json_grammar(schema: Any, param: str) -> GrammarSpec:
    """Return the grammar of a JSON schema with closed objects and implied types.

    Raises GrammarError with keyword and path. schema: decoded, or its JSON text.
    """
    if isinstance(schema, str):
        schema = schemas.decode(schema, param)
    return GrammarSpec("json_schema", schemas.canonical(schema, param, close=True, imply=True))


def _structured(given: Any) -> GrammarSpec | None:
    """Translate vLLM's `structured_outputs`."""
    field = "structured_outputs"
    if not isinstance(given, dict):
        raise _invalid(field, "it must be an object")
    requested = {name: value for name, value in given.items() if value is not None and value is not False}
    for name in requested:
        if name not in _STRUCTURED:
            raise ValidationError(f"`{field}.{shown(name)}` is not supported", field)
    if len(requested) != 1:
        known = ", ".join(_STRUCTURED)
        raise _invalid(field, f"it must have one of {known}. Given: {', '.join(requested) or 'none'}")
    ((name, value),) = requested.items()
    if name == "json_object":
        return json_grammar(_ANY_OBJECT, f"{field}.json_object")
    return _of_kind(name, value, f"{field}.{name}")


def _of_kind(kind: str, value: Any, param: str) -> GrammarSpec:
    if kind == "json":
        return json_grammar(value, param)
    if kind == "regex":
        return _regex(value, param)
    if kind == "choice":
        return _choice(value, param)
    if not isinstance(value, str) or not value.strip():
        raise _invalid(param, "it must be the text of a grammar, in Lark or EBNF")
    return GrammarSpec("grammar", _utf8(value, param))


def _regex(value: Any, param: str) -> GrammarSpec:
    if not isinstance(value, str) or not value:
        raise _invalid(param, "it must be a regular expression")
    return GrammarSpec("regex", _utf8(value, param))


def _choice(value: Any, param: str) -> GrammarSpec:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
        raise _invalid(param, "it must be a list of texts, none of them empty")
    if len(value) > MAX_CHOICES:
        raise _invalid(param, f"it may have up to {MAX_CHOICES} texts. Given: {len(value)}")
    texts = list(dict.fromkeys(value))
    return GrammarSpec("choice", _utf8(json.dumps(texts, ensure_ascii=False, separators=(",", ":")), param))


def _utf8(text: str, param: str) -> str:
    """Return the text unchanged. Raises GrammarError for halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise GrammarError("The grammar has characters that cannot be written in UTF-8.", param) from None
    return text


def _not_valid(reason: str) -> GrammarError:
    return GrammarError(f"grammar is not valid: {reason}", "grammar")


def _invalid(param: str, reason: str) -> ValidationError:
    return ValidationError(f"Invalid '{param}': {reason}", param)
