"""JSON Schemas (draft 2020-12) made canonical, and refused where a grammar could not serve them exactly.

The rule: whatever an accepted schema lets through is valid under it. A keyword that a grammar cannot express is
rewritten by cases where these are few (`cases.py`), else refused with its JSON path, unless it says nothing here
(`uniqueItems: false`). What the grammar libraries read loosely is rewritten (dates, patterns, lists under `items`,
large bounds). Narrower than the schema is allowed, and this is where: keys come in the order of `properties`, then
other required ones, then the rest; integers have no fraction, numbers with bounds no exponent; strings escape only what
they must; and, where that is asked for, what `closed.py` and `implied.py` describe.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tokenmill import jsontext
from tokenmill.errors import GrammarError
from tokenmill.grammar import cases, closed, implied
from tokenmill.grammar.disjoint import Prover
from tokenmill.grammar.document import Document, pointer
from tokenmill.grammar.values import Json, children
from tokenmill.repeated import repeated_key

MAX_SCHEMA_BYTES = 256 << 10
MAX_DEPTH = 100
"""Levels of JSON, not of schemas: one schema inside another takes two or three."""


def canonical(schema: Json, param: str | None = None, *, close: bool = False, imply: bool = False) -> str:
    """The schema's canonical text: equal schemas written alike have one. `schema` is decoded JSON and is not changed.

    `close`: objects that name their keys have no others, see `closed.py`. `imply`: a schema that names no type is of
    the types that its keywords belong to, see `implied.py`. GrammarError names keyword and path of what
    is malformed or cannot be served exactly.
    """
    source = _encode(schema, param)
    _check_size(len(source.encode()), param)
    if schema is False:
        raise GrammarError("The JSON schema cannot be used: at #: `false` allows nothing.", param)
    if schema is True:
        return "{}"
    document = Document(json.loads(source), param)
    if imply and document.nodes:
        implied.imply([node for _, node in document.nodes], document.resolve, document.meant)
    document.rewrite_for_types()
    budget = cases.Budget(MAX_SCHEMA_BYTES)
    _say_otherwise(document, budget)
    if close:
        closed.close([node for _, node in document.nodes], document.resolve)
    _by_cases(document, budget)
    open_objects = [path for path, node in document.nodes if node.get("additionalProperties") is not False
                    and any(node.get(key) for key in ("properties", "patternProperties", "required"))]  # fmt: skip
    if open_objects and document.controls:
        document.refuse(document.controls, "a control character beside an object with `additionalProperties` "
                        f"({open_objects[-1]}) is not supported")  # fmt: skip
    return _encode(document.root, param)


def _say_otherwise(document: Document, budget: cases.Budget) -> None:
    """What no grammar has, in other words."""
    prover = Prover(document.resolve)
    for path, node in document.nodes:
        for key, rule in (("propertyNames", cases.property_names), ("uniqueItems", cases.unique_items)):
            if key in node:
                _exactly(document, path, key, rule, node, document.resolve, budget)
        if "oneOf" in node and "anyOf" not in node and prover.exclusive(node["oneOf"]):
            node["anyOf"] = node.pop("oneOf")


def _by_cases(document: Document, budget: cases.Budget) -> None:
    """What no grammar has, by cases: `anyOf` beside what there is."""
    for path, node in document.nodes:
        for key in ("minProperties", "maxProperties"):
            if key in node:
                _exactly(document, path, key, cases.property_counts, node)
        for key in ("dependentRequired", "dependencies"):
            if key in node:
                _exactly(document, path, key, cases.dependent_required, node, key)
        if cases.has_condition(node):
            _exactly(document, path, "if", cases.conditions, node, document.resolve, budget)


def _exactly(document: Document, path: str, key: str, rule: Callable[..., None], *args: Any) -> None:
    try:
        rule(*args)
    except cases.Inexact as why:
        document.refuse(pointer(path, key), f"`{key}` {why}")


def decode(text: str, param: str | None = None) -> Json:
    """A schema sent as JSON text. GrammarError if it is none, or gives a key twice."""
    _check_size(len(text), param)
    try:
        found = repeated_key(text)
        if found is not None:
            where = pointer("#", *found.steps, found.key)
            raise GrammarError(f"The JSON schema cannot be used: at {where}: the key is given twice.", param)
        return json.loads(text)
    except RecursionError:
        raise GrammarError(f"The JSON schema is nested more than {MAX_DEPTH} levels deep.", param) from None
    except ValueError:
        why = jsontext.fault(text.encode(errors="replace")) or "it cannot be read"
        raise GrammarError(f"The JSON schema is not JSON: {why}", param) from None


def needs_unicode_escapes(source: str) -> bool:
    """Whether a canonical schema speaks of control characters that JSON writes as \\u00XX.

    Only then may the answer escape so, and no object may have keys that the schema does not name: a key of another
    spelling would go past its own schema.
    """
    return any(mark in source for mark in _CONTROL_MARKS)


_CONTROL_MARKS = tuple(
    mark
    for code in range(0x20) if code not in (8, 9, 10, 12, 13)
    for mark in (f"\\u{code:04x}", f"\\\\x{code:02X}")
)  # fmt: skip


def _check_size(size: int, param: str | None) -> None:
    if size > MAX_SCHEMA_BYTES:
        raise GrammarError(f"The JSON schema takes {size} bytes; at most {MAX_SCHEMA_BYTES} are allowed.", param)


def _encode(value: Json, param: str | None) -> str:
    if _depth(value) > MAX_DEPTH:
        raise GrammarError(f"The JSON schema is nested more than {MAX_DEPTH} levels deep.", param)
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        text.encode()
    except UnicodeEncodeError:
        raise GrammarError("The JSON schema has characters that cannot be written in UTF-8.", param) from None
    except ValueError:
        raise GrammarError("The JSON schema has a number that is not finite.", param) from None
    return text


def _depth(value: Json) -> int:
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        depth += 1
        level = [child for node in level for child in children(node) if isinstance(child, dict | list)]
    return depth
