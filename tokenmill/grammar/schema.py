"""Canonical form of JSON Schemas (draft 2020-12), and refusal of those that a grammar could not serve exactly.

Invariant: every text that the grammar of an accepted schema allows is valid under that schema. A keyword that a grammar
cannot express is rewritten by cases where these are few (`cases.py`), else refused with its JSON path, unless it has no
effect (`uniqueItems: false`). Keywords that the grammar library reads loosely are rewritten (dates, patterns, lists
under `items`, large bounds). The grammar may be narrower than the schema in these respects: keys come in the order of
`properties`, then other required ones, then the rest; integers have no fraction, numbers with bounds no exponent;
strings escape only what they must; and, on request, the rules of `closed.py` and `implied.py`.
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
"""Levels of JSON, of which a schema inside another takes two or three."""


def canonical(schema: Json, param: str | None = None, *, close: bool = False, imply: bool = False) -> str:
    """Return the schema's canonical text, the same for equal schemas with the same order of keys.

    Raises GrammarError with keyword and path for a schema that is malformed or cannot be served exactly.

    schema: decoded JSON; it is not changed. param: the request's field, for the error. close: forbid other keys in
    objects with `properties`, see `closed.py`. imply: add implied types, see `implied.py`.
    """
    source = _encode(schema, param)
    _check_size(len(source.encode()), param)
    if schema is False:
        raise GrammarError("The JSON schema cannot be used: at #: `false` allows nothing.", param)
    if schema is True:
        return "{}"
    document = Document(json.loads(source), param)
    if imply and document.nodes:
        implied.imply([node for _, node in document.nodes], document.resolve, document.keyword_types)
    document.rewrite_for_types()
    budget = cases.Budget(MAX_SCHEMA_BYTES)
    _rewrite_equivalently(document, budget)
    if close:
        closed.close([node for _, node in document.nodes], document.resolve)
    _by_cases(document, budget)
    open_objects = [path for path, node in document.nodes if node.get("additionalProperties") is not False
                    and any(node.get(key) for key in ("properties", "patternProperties", "required"))]  # fmt: skip
    if open_objects and document.controls:
        document.refuse(document.controls, "a control character beside an object with `additionalProperties` "
                        f"({open_objects[-1]}) is not supported")  # fmt: skip
    return _encode(document.root, param)


def _rewrite_equivalently(document: Document, budget: cases.Budget) -> None:
    """Rewrite `propertyNames`, `uniqueItems` and exclusive `oneOf` by equivalent keywords."""
    prover = Prover(document.resolve)
    for path, node in document.nodes:
        for key, rule in (("propertyNames", cases.property_names), ("uniqueItems", cases.unique_items)):
            if key in node:
                _exactly(document, path, key, rule, node, document.resolve, budget)
        if "oneOf" in node and "anyOf" not in node and prover.exclusive(node["oneOf"]):
            node["anyOf"] = node.pop("oneOf")


def _by_cases(document: Document, budget: cases.Budget) -> None:
    """Rewrite counts of keys, dependent keys and conditions by adding an `anyOf` of cases."""
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
    """Decode a schema sent as JSON text. Raises GrammarError if it is not JSON, or contains a key twice."""
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
    """Return whether a canonical schema contains control characters that JSON writes as \\u00XX.

    Only then may the answer contain such escapes, and all objects must be closed: a key spelled with escapes would
    otherwise match as an additional key and bypass its own schema.
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
