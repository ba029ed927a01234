"""A schema without `type` gets the types that its keywords imply, and still rejects all that it rejected."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support_grammar import accepts, backend, compact, made, small_vocabulary

jsonschema = pytest.importorskip("jsonschema")

from bench.grammar import Play, Player, schemas  # noqa: E402
from tokenmill.errors import GrammarError  # noqa: E402
from tokenmill.grammar import schema  # noqa: E402
from tokenmill.text.guided import json_grammar  # noqa: E402

Oracle = jsonschema.Draft202012Validator
GUIDANCE = backend()
A, B = {"required": ["a"]}, {"required": ["b"]}
LOCATION = {"properties": {"location": {"title": "Location", "type": "string"}, "n": {"type": "integer"}}}
KIND = {"properties": {"kind": {"enum": ["x", "y"]}}, "required": ["kind"]}


def tagged(value: str, **more: Any) -> dict[str, Any]:
    return {"properties": {"kind": {"const": value}, **more}, "required": ["kind"]}


def meant(value: Any) -> Any:
    return json.loads(schema.canonical(value, imply=True))


ONE_KEYWORD = [
    ({"properties": {"a": {}}}, "object"), (A, "object"), ({"additionalProperties": {}}, "object"),
    ({"additionalProperties": False}, "object"), ({"patternProperties": {"^a": {}}}, "object"),
    ({"propertyNames": {"pattern": "^a"}}, "object"), ({"propertyNames": {}}, "object"),
    ({"minProperties": 1}, "object"), ({"maxProperties": 1}, "object"), ({"dependentRequired": {}}, "object"),
    ({"items": {}}, "array"), ({"items": [{}]}, "array"), ({"prefixItems": [{}]}, "array"), ({"minItems": 1}, "array"),
    ({"maxItems": 1}, "array"), ({"uniqueItems": False}, "array"), ({"minContains": 1}, "array"),
    ({"additionalItems": False}, "array"),
    ({"pattern": "a"}, "string"), ({"minLength": 1}, "string"), ({"maxLength": 1}, "string"),
    ({"format": "date"}, "string"), ({"format": "password"}, "string"), ({"contentEncoding": "base64"}, "string"),
    ({"minimum": 1}, "number"), ({"maximum": 1}, "number"), ({"exclusiveMinimum": 1}, "number"),
    ({"exclusiveMaximum": 1}, "number"), ({"multipleOf": 2}, "number"), ({"format": "double"}, "number"),
    ({"format": "int64"}, "integer"), ({"format": "uint8", "minimum": 3}, "integer"),
]  # fmt: skip


@pytest.mark.parametrize("value, kind", ONE_KEYWORD)
def test_each_keyword_of_one_type_implies_it_at_every_depth(value: Any, kind: str) -> None:
    assert meant(value)["type"] == kind
    assert meant({**value, "type": "null"})["type"] == "null"
    inside = meant({"properties": {"p": {"items": {"anyOf": [value, {"type": "boolean"}]}}}})
    found = inside["properties"]["p"]["items"]["anyOf"]
    assert [one["type"] for one in found] == [kind, "boolean"]
    behind = meant({"additionalProperties": {"$ref": "#/$defs/d"}, "$defs": {"d": value}})
    assert behind["$defs"]["d"]["type"] == kind
    assert behind["additionalProperties"] == {"$ref": "#/$defs/d"}


@pytest.mark.parametrize("value, kinds", [
    ({**LOCATION, "minItems": 1}, ["array", "object"]),
    ({"minLength": 1, "minimum": 0}, ["number", "string"]),
    ({"allOf": [LOCATION, A]}, "object"),
    ({"allOf": [LOCATION, {"minLength": 3}]}, ["object", "string"]),
    ({**LOCATION, "anyOf": [A, B]}, "object"),
    ({**LOCATION, "anyOf": [A, {"type": "null"}]}, ["null", "object"]),
    ({**LOCATION, "anyOf": [{}, A]}, "object"),
    ({**A, "$ref": "#/$defs/d", "$defs": {"d": LOCATION}}, "object"),
    ({**LOCATION, "allOf": [{"anyOf": [A, B]}]}, "object"),
    ({**KIND, "if": {"properties": {"kind": {"const": "x"}}}, "then": A}, "object"),
])  # fmt: skip
def test_what_stands_beside_is_merged(value: Any, kinds: Any) -> None:
    assert meant(value)["type"] == kinds


@pytest.mark.parametrize("value", [
    {}, {"description": "any"}, {"anyOf": [{}, {"type": "string"}]}, {"enum": ["a", 1], "minLength": 1},
    {"const": 3, "pattern": "x"}, {**LOCATION, "anyOf": [{"type": "string"}, {"type": "object"}]},
    {**LOCATION, "allOf": [{"type": ["object", "null"]}]},
    {**LOCATION, "$ref": "#/$defs/d", "$defs": {"d": {"type": "string"}}}, {"type": "string", "anyOf": [A]},
    {"allOf": [{"anyOf": [A]}, {"type": "array"}]}, {"allOf": [{"oneOf": [A]}, {"type": "array"}]},
    {"oneOf": [{"type": "string"}, A]}, {"oneOf": [{"minimum": 1}, {"maximum": 5}]}, {"oneOf": [A, B]},
    {"type": "array", "items": {"oneOf": [{"type": "array", "items": A}, {"type": "array", "items": B}]}},
])  # fmt: skip
def test_a_schema_is_left_alone_where_its_types_are_named_otherwise_or_fewer_would_be_more(value: Any) -> None:
    assert schema.canonical(value, imply=True) == schema.canonical(value)


def test_a_definition_is_narrowed_only_where_that_fits_everywhere_it_stands() -> None:
    at_its_own = {"properties": {"p": {"$ref": "#/$defs/d"}}}
    for other, kind in (({"allOf": [{"$ref": "#/$defs/d"}, B]}, "object"),
                        ({"allOf": [{"$ref": "#/$defs/d"}, {"minLength": 3}]}, None),
                        ({"type": "string", "anyOf": [{"$ref": "#/$defs/d"}]}, None),
                        ({"type": ["string", "object"], "anyOf": [{"$ref": "#/$defs/d"}]}, "object"),
                        ({"oneOf": [{"$ref": "#/$defs/d"}, {"type": "string"}]}, None)):  # fmt: skip
        found = meant({"properties": {**at_its_own["properties"], "q": other}, "$defs": {"d": A}})
        assert found["$defs"]["d"].get("type") == kind, other


def test_alternatives_are_told_apart_among_the_values_that_are_meant() -> None:
    texts = {"oneOf": [{"maxLength": 1}, {"minLength": 2}]}
    objects = {"oneOf": [tagged("x"), tagged("y", v={"minimum": 1})]}
    tags = [{"kind": "x"}, {"kind": "y"}, {"kind": "z"}, {"kind": "y", "v": 1}, {}]
    for value in (texts, objects, {"type": "object", **objects}):
        assert "oneOf" in json.loads(schema.canonical(value))
        found = meant(value)
        assert found["type"] in ("object", "string")
        grammar = made(GUIDANCE, "json_schema", json.dumps(found))
        for instance in ("", "a", "ab", 1, None, [], *tags):
            is_meant = Oracle(value).is_valid(instance) and Oracle({"type": found["type"]}).is_valid(instance)
            assert accepts(grammar, compact(instance)) == is_meant, (value, instance)


GUIDES = [
    {**LOCATION, "required": ["location"]},
    {"properties": {"p": {"properties": {"q": {"minimum": 1, "maximum": 9}}, "required": ["q"]}}, "required": ["p"]},
    {"items": {"pattern": "^[a-z]{1,3}$"}, "minItems": 1, "maxItems": 3},
    {"prefixItems": [{"format": "date"}, {"multipleOf": 5, "minimum": 0}], "items": False, "minItems": 2},
    {"$ref": "#/$defs/n", "$defs": {"n": {**A, "properties": {"a": {"maxLength": 2}, "n": {"$ref": "#/$defs/n"}}}}},
    {"allOf": [{"$ref": "#/$defs/b"}, {"properties": {"y": {"minLength": 1}}, "required": ["y"]}],
     "$defs": {"b": {"properties": {"x": {"items": {"enum": [1, 2]}, "uniqueItems": True}}, "required": ["x"]}}},
    {"anyOf": [tagged("x"), {"items": {"minimum": 0}, "maxItems": 2}]},
]  # fmt: skip
TYPES: Mapping[str, type | tuple[type, ...]] = {"object": dict, "array": list, "string": str, "number": (int, float)}
OF = {"properties": "object", "required": "object", "items": "array", "prefixItems": "array", "pattern": "string",
      "maxLength": "string", "minLength": "string", "minimum": "number", "multipleOf": "number"}  # fmt: skip


def holds(value: Any, node: Any, root: Any) -> bool:
    """Return True if a value has, at every depth, the type implied by the first keyword of its schemas."""
    if "$ref" in node:
        node = root["$defs"][node["$ref"].rpartition("/")[2]]
    if "anyOf" in node:
        return any(holds(value, one, root) for one in node["anyOf"])
    if "type" not in node and any(key in OF and not isinstance(value, TYPES[OF[key]]) for key in node):
        return False
    inner = list(node.get("allOf", ()))
    if isinstance(value, dict):
        pairs = [(value[key], one) for key, one in node.get("properties", {}).items() if key in value]
    elif isinstance(value, list):
        first = node.get("prefixItems", [])
        pairs = [*zip(value, first, strict=False), *((one, node.get("items") or {}) for one in value[len(first) :])]
    else:
        pairs = []
    return all(holds(value, one, root) for one in inner) and all(holds(one, its, root) for one, its in pairs)


@pytest.mark.parametrize("value", GUIDES)
def test_answers_are_valid_and_of_the_types_that_are_meant(value: Any) -> None:
    """Check random answers. TGI's first documented example gave numbers and null."""
    vocabulary = small_vocabulary()
    grammar = made(GUIDANCE, "json_schema", json_grammar(value, "grammar").source)
    finished = 0
    for seed in range(25):
        play = Play(grammar, Player(vocabulary, seed), vocabulary, most=200)
        if play.finished:
            finished += 1
            answer = json.loads(play.text)
            assert Oracle(value).is_valid(answer), answer
            assert holds(answer, value, value), answer
    assert finished > 5


def without_types(node: Any, keep: bool = False) -> Any:
    """Return a schema without the types that its keywords imply. `keep`: for a part or an alternative of another."""
    if isinstance(node, list):
        return [without_types(one, keep) for one in node]
    if not isinstance(node, dict):
        return node
    made: dict[str, Any] = {}
    for key, value in node.items():
        if key in ("properties", "patternProperties", "$defs"):
            made[key] = {name: without_types(one) for name, one in value.items()}
        elif key in ("items", "additionalProperties", "prefixItems", "anyOf"):
            made[key] = without_types(value)
        elif key in ("allOf", "oneOf"):
            made[key] = without_types(value, keep=True)
        else:
            made[key] = value
    if not keep and not {"enum", "const"} & made.keys():
        kinds = {OF.get(key) for key in made if key in OF} | ({"object"} if "propertyNames" in made else set())
        if list(kinds) == [made.get("type")]:
            del made["type"]
    return made


def test_types_that_keywords_imply_may_be_left_out() -> None:
    left_out = 0
    for value in schemas(150, seed=5):
        short = without_types(value)
        left_out += json.dumps(value).count('"type"') - json.dumps(short).count('"type"')
        assert meant(short) == meant(value)
    assert left_out > 300


KEYWORDS = ("properties", "required", "items", "additionalProperties", "prefixItems", "propertyNames", "if", "minimum",
            "maximum", "minLength", "maxLength", "minItems", "anyOf", "oneOf", "allOf", "$ref", "enum")  # fmt: skip


def random_schema(draw: random.Random, depth: int) -> Any:
    """Return a schema of keywords that may be combined, mostly without a type."""
    kinds = ["object", "string", "number", "array", "null", ["object", "null"], ["string", "integer"]]
    made: dict[str, Any] = {"type": draw.choice(kinds)} if draw.random() < 0.25 else {}

    def inner() -> Any:
        simple = [{"type": "string"}, {"minimum": 1}, {"maxLength": 1}, A, {}, True]
        return random_schema(draw, depth - 1) if depth else draw.choice(simple)

    for _ in range(draw.choice([0, 1, 1, 2, 2])):
        key = draw.choice(KEYWORDS)
        if key == "properties":
            made[key] = {name: inner() for name in draw.sample("ab", draw.randint(1, 2))}
        elif key == "if":
            made |= {"if": {"properties": {"a": {"const": 1}}}, "then": inner()}
            made["properties"] = {"a": {"enum": [1, "a"]}}
        elif key in ("items", "additionalProperties"):
            made[key] = inner()
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems"):
            made[key] = [inner() for _ in range(draw.randint(1, 3))]
        elif key.startswith(("min", "max")):
            made[key] = draw.randint(0, 2)
        else:
            values = draw.sample(["a", 1, None, {"a": 1}], 3)
            named = {"required": ["b"], "propertyNames": {"enum": ["a", "b"]}, "enum": values}
            made[key] = named.get(key, "#/$defs/" + draw.choice("XYZ"))
    return made


INSTANCES = [None, True, 0, 1, 2, 2.5, "", "a", "abc", [], [0], ["a"], [{}], {}, {"a": 0}, {"a": 1}, {"a": "a"},
             {"b": "abc"}, {"a": {"a": 1}}, {"a": 1, "b": 1}, {"a": [], "b": [1]}, {"b": {"a": "a"}}]  # fmt: skip


@settings(max_examples=250, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_nothing_is_let_through_that_the_schema_as_it_was_sent_forbids(seed: int, close: bool) -> None:
    draw = random.Random(seed)
    value = {**random_schema(draw, 2), "$defs": {name: random_schema(draw, 1) for name in "XYZ"}}
    try:
        grammar = made(GUIDANCE, "json_schema", schema.canonical(value, close=close, imply=True))
    except GrammarError:
        return
    for instance in INSTANCES:
        if accepts(grammar, compact(instance)):
            try:
                assert Oracle(value).is_valid(instance), (value, instance)
            except RecursionError:
                return


def test_schemas_that_refer_to_themselves_a_thousand_times_are_looked_at_once() -> None:
    many = [{"$ref": "#/$defs/d"}] * 1000
    for keys in (("anyOf",), ("oneOf",), ("allOf",), ("anyOf", "allOf")):
        node = {key: [*many, A] for key in keys}
        schema.canonical({"properties": {"p": {"$ref": "#/$defs/d"}}, "$defs": {"d": node}}, imply=True)
    chain = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}], **A} for i in range(3000)} | {"d3000": A}
    schema.canonical({"$ref": "#/$defs/d0", "$defs": chain}, imply=True)
