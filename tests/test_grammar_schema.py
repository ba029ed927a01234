"""Schemas are served exactly: no accepted answer is invalid under its schema; the others are refused by name."""

from __future__ import annotations

import datetime
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support_grammar import accepts, backend, compact, made, mutated, small_vocabulary

jsonschema = pytest.importorskip("jsonschema")

from bench.grammar import Play, Player, schemas  # noqa: E402
from tokenmill.errors import GrammarError  # noqa: E402
from tokenmill.grammar import schema  # noqa: E402
from tokenmill.grammar.base import Backend  # noqa: E402
from tokenmill.grammar.llguidance import lark_json  # noqa: E402

Oracle = jsonschema.Draft202012Validator
GUIDANCE = backend()
KEYWORDS = ("type", "properties", "items", "required", "anyOf", "oneOf", "allOf", "$ref", "$defs", "a", "enum", "const",
            "minimum", "maxLength", "pattern", "patternProperties", "additionalProperties", "minProperties", "format",
            "prefixItems", "not", "uniqueItems", "multipleOf", "additionalItems", "if", "then", "else", "propertyNames",
            "dependentRequired", "maxProperties")  # fmt: skip
SAMPLE = list(schemas(120, seed=3))


def oracle(value: Any) -> Any:
    return Oracle(value, format_checker=Oracle.FORMAT_CHECKER)


@pytest.fixture(scope="module")
def guidance() -> Backend:
    return backend()


def test_random_answers_and_their_mutants_are_accepted_only_if_valid(guidance: Backend) -> None:
    """Draw answers from the masks and change them a little: each one accepted by the grammar is valid by the oracle."""
    draw, vocabulary = random.Random(1), small_vocabulary()
    finished = invalid_mutants = 0
    for number, value in enumerate(SAMPLE):
        grammar = made(guidance, "json_schema", schema.canonical(value))  # none is refused
        check = oracle(value)
        for answer in range(3):
            play = Play(grammar, Player(vocabulary, number * 10 + answer), vocabulary, most=250)
            if not play.finished:
                continue
            finished += 1
            instance = json.loads(play.text)
            assert check.is_valid(instance), (value, play.text)
            for _ in range(12):
                mutant = mutated(instance, draw)
                valid = check.is_valid(mutant)
                invalid_mutants += not valid
                assert valid or not accepts(grammar, compact(mutant)), (value, mutant)
    assert finished > len(SAMPLE)
    assert invalid_mutants > finished


VALID = [
    ({"type": "object", "properties": {"a": {"type": "integer"}, "b": {}}, "required": ["b"]},
     [{"a": 1, "b": 2}, {"b": [1, {"x": None}]}, {"b": 1, "z": "free"}], [{"a": 1}, {"a": "x", "b": 1}]),
    ({"type": "array", "items": [{"type": "string"}], "additionalItems": False}, [["a"], []], [["a", 1], [1]]),
    ({"$ref": "#/$defs/t", "$defs": {"t": {"type": "object", "additionalProperties": {"$ref": "#/$defs/t"}}}},
     [{}, {"a": {"b": {}}}], [{"a": 1}, 1]),
    ({"patternProperties": {"^x-": {"type": "integer"}}, "additionalProperties": False, "type": "object"},
     [{"x-a": 1}, {}], [{"x-a": "1"}, {"y": 1}]),
    ({"patternProperties": {"^a": {"minimum": 5}}, "properties": {"ab": {"type": "integer"}}, "type": "object"},
     [{"ab": 6}, {"b": 1}], [{"ab": 1}, {"ac": 1}, {"ab": 6.5}]),
    ({"oneOf": [{"type": "string"}, {"type": "integer"}]}, ["a", 1], [1.5, None]),
    ({"allOf": [{"minimum": 3}, {"maximum": 5, "type": "integer"}]}, [3, 5], [2, 6, 3.5]),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 1.5}, [0.1, 1.5, 1], [0, 1.51, -1]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ["éé", "日本語", "a\n"], ["a", "abcd"]),
    ({"enum": ["é", 1, None, {"a": [1]}]}, ["é", 1, None, {"a": [1]}], ["e", 2, {"a": []}]),
    ({"type": ["string", "null"], "maxLength": 1}, ["a", None], ["ab", 1]),
    ({"const": "a\u0001b"}, ["a\u0001b"], ["ab"]),
    ({"type": "string", "pattern": "a.c"}, ["abc", "xxabcxx"], ["a\nc", "ab"]),
    ({"type": "string", "pattern": "^[a-z&&b[]$"}, ["&", "[", "q"], ["A"]),
    ({"type": "string", "pattern": "^a[\\x00-\\x1f]b$"}, ["a\u0001b", "a\nb"], ["ab", "axb"]),
    ({"type": "object", "minProperties": 1, "additionalProperties": {"type": "integer"}}, [{"a": 1}], [{}]),
    ({"uniqueItems": False, "not": False, "unevaluatedProperties": True, "then": {}, "type": "array"}, [[1, 1]], [1]),
    (True, [1, "a", {"a": 1}], []),
]  # fmt: skip


@pytest.mark.parametrize("value, good, bad", VALID)
def test_examples_are_accepted_as_the_oracle_does(guidance: Backend, value: Any, good: Any, bad: Any) -> None:
    grammar = made(guidance, "json_schema", schema.canonical(value))
    if "additionalItems" not in str(value):  # of an older draft
        assert all(map(oracle(value).is_valid, good))
        assert not any(map(oracle(value).is_valid, bad))
    assert [one for one in good if not accepts(grammar, compact(one))] == []
    assert [one for one in bad if accepts(grammar, compact(one))] == []


def test_a_key_of_another_spelling_does_not_go_past_its_schema(guidance: Backend) -> None:
    value = {"type": "object", "properties": {"x": {"type": "string"}}, "additionalProperties": {"type": "integer"}}
    grammar = made(guidance, "json_schema", schema.canonical(value))
    assert accepts(grammar, '{"x":"a","y":1}')
    assert not accepts(grammar, '{"\\u0078":1}')
    assert not accepts(grammar, '{"x":"a","x":1}')


def test_dates_are_those_of_the_calendar(guidance: Backend) -> None:
    grammar = made(guidance, "json_schema", schema.canonical({"type": "string", "format": "date"}))
    draw = random.Random(2)
    days = [f"{draw.choice([1, 4, 100, 400, 1900, 1996, 2000, 2023, 2024, 2100, 9999]):04}-{m:02}-{d:02}"
            for m in range(14) for d in range(33) for _ in range(2)]  # fmt: skip
    for day in [*days, *(f"{year:04}-02-29" for year in range(0, 10_000, 4)), "2024-2-29", "24-02-29"]:
        assert accepts(grammar, f'"{day}"') == is_a_date(day), day


def is_a_date(day: str) -> bool:
    try:
        return len(day) == 10 and bool(datetime.date.fromisoformat(day))
    except ValueError:
        return False


REFUSED = [
    ({"properties": {"a": {"not": {"type": "string"}}}}, "#/properties/a/not"),
    ({"type": "array", "uniqueItems": True}, "#/uniqueItems"),
    ({"if": {"minimum": 1}, "then": {"maximum": 3}}, "#/"),
    ({"$defs": {"x": {"dependentSchemas": {"a": {"required": ["b"]}}}}}, "#/$defs/x/dependentSchemas"),
    ({"items": {"unevaluatedProperties": False}}, "#/items/unevaluatedProperties"),
    ({"contains": {"type": "string"}}, "#/contains"),
    ({"propertyNames": {"not": {"const": "a"}}}, "#/propertyNames/not"),
    ({"anyOf": [{"type": "string"}, {"$ref": "http://example.com/x"}]}, "#/anyOf/1/$ref"),
    ({"$ref": "#/$defs/missing"}, "#/$ref"),
    ({"$dynamicRef": "#x"}, "#/$dynamicRef"),
    ({"properties": {"a/b~c": {"type": "string", "format": "idn-email"}}}, "#/properties/a~1b~0c/format"),
    ({"properties": {"a": {"type": "strin"}}}, "#/properties/a/type"),
    ({"minimum": "3"}, "#/minimum"),
    ({"maxLength": -1}, "#/maxLength"),
    ({"multipleOf": 0}, "#/multipleOf"),
    ({"enum": []}, "#/enum"),
    ({"required": "a"}, "#/required"),
    ({"properties": {"a": 5}}, "#/properties/a"),
    ({"allOf": []}, "#/allOf"),
    ({"type": "object", "minProperties": 2}, "#/minProperties"),
    ({"pattern": "(?=a)b"}, "#/pattern"),
    ({"patternProperties": {"(a)\\1": {}}}, "#/patternProperties/(a)\\1"),
    ({"properties": {"a\u0001": {}}, "type": "object"}, "#/properties/a\u0001"),
    ({"x": {"y": {"contains": {}}}, "items": {"$ref": "#/x/y"}}, "#/x/y/contains"),
]


@pytest.mark.parametrize("value, path", REFUSED)
def test_what_cannot_be_served_is_refused_by_keyword_and_path(value: Any, path: str) -> None:
    before = json.dumps(value)
    with pytest.raises(GrammarError) as caught:
        schema.canonical(value, "response_format")
    assert path in str(caught.value)
    assert caught.value.param == "response_format"
    assert json.dumps(value) == before


@pytest.mark.parametrize("value, path", [
    ({"properties": {"a": {"items": {"oneOf": [{"minimum": 1}, {"maximum": 5}]}}}}, "#/properties/a/items/oneOf"),
    ({"$defs": {"d": {"properties": {"q": {"patternProperties": {"^a": {"minimum": 5}, "b$": {"type": "string"}}}}}},
      "$ref": "#/$defs/d"}, "#/$defs/d/properties/q/patternProperties"),
    ({"anyOf": [{"type": "string"}, {"properties": {"a": {}}, "type": "object", "minProperties": 1}]},
     "#/anyOf/1/minProperties"),
    ({"type": "object", "required": ["z"], "additionalProperties": False}, "#/required"),
])  # fmt: skip
def test_what_the_library_refuses_is_located(guidance: Backend, value: Any, path: str) -> None:
    with pytest.raises(GrammarError) as caught:
        made(guidance, "json_schema", schema.canonical(value))
    assert f"at {path}:" in str(caught.value)


def test_large_and_deep_schemas_are_refused_at_once() -> None:
    deep: Any = {}
    for _ in range(20_000):
        deep = {"items": deep}
    with pytest.raises(GrammarError, match="levels deep"):
        schema.canonical(deep)
    for text in ('{"items":' * 100_000 + "1", json.dumps({"enum": ["x" * 1_000_000]}), "{", "[1]"):
        with pytest.raises(GrammarError):
            schema.canonical(schema.decode(text))
    with pytest.raises(GrammarError, match="bytes"):
        schema.canonical({"enum": ["x" * 1_000_000]})
    with pytest.raises(GrammarError, match="UTF-8"):
        schema.canonical({"const": "\ud800"})
    with pytest.raises(GrammarError, match="finite"):
        schema.canonical({"const": float("inf")})


def test_canonical_text_keeps_the_order_of_keys_and_is_the_same_again() -> None:
    value = {"title": "T", "type": "object", "properties": {"z": {"type": "string", "description": "d"}, "a": {}}}
    text = schema.canonical(value)
    assert text == '{"type":"object","properties":{"z":{"type":"string"},"a":{}}}'
    for one in SAMPLE:
        assert schema.canonical(json.loads(schema.canonical(one))) == schema.canonical(one)


def test_options_of_the_library_in_a_schema_do_not_count(guidance: Backend) -> None:
    value = {"x-guidance": {"lenient": True, "coerce_one_of": True}, "oneOf": [{"minimum": 1}, {"maximum": 5}]}
    with pytest.raises(GrammarError, match="oneOf"):
        made(guidance, "json_schema", schema.canonical(value))


def test_a_schema_inside_a_lark_grammar_is_served_as_exactly(guidance: Backend) -> None:
    value = {"type": "object", "properties": {"x": {"type": "string"}}, "additionalProperties": {"type": "integer"}}
    source = lark_json(schema.canonical(value))
    grammar = made(guidance, "lark", f'start: "<call>" args "</call>"\nargs: %json {source}\n')
    assert accepts(grammar, '<call>{"x": "a"}</call>')
    assert not accepts(grammar, '<call>{"\\u0078": 1}</call>')
    assert not accepts(grammar, '<call>{"x":                       "a"}</call>')


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text("a^$#/(\u0001", max_size=3)
    | st.sampled_from(["string", "object", "integer", "#", "#/$defs/a", "date"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(JSONS)
def test_any_json_is_a_schema_or_refused(value: Any) -> None:
    """No other error occurs, and the grammar accepts nothing that the oracle refuses."""
    try:
        grammar = made(GUIDANCE, "json_schema", schema.canonical(value))
    except GrammarError:
        return
    try:
        Oracle.check_schema(value)
    except jsonschema.SchemaError:
        return  # older drafts, and values of keywords without an effect
    for instance in (None, 0, 1, 2.5, "", "a", "2024-02-29", [], [0, "a"], {}, {"a": 0}, {"type": "a", "a": []}):
        if accepts(grammar, compact(instance)):
            try:
                valid = oracle(value).is_valid(instance)
            except RecursionError:
                continue
            assert valid, (value, instance)
