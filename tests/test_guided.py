"""Grammars as clients send them: all spellings give one grammar, and invalid ones are refused by their field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tokenmill.errors import GrammarError, ValidationError
from tokenmill.grammar.schema import canonical
from tokenmill.text.guided import native_grammar, openai_grammar
from tokenmill.wire.messages import GrammarSpec

OPEN = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name"],
}
SHUT = {"additionalProperties": False}
SCHEMA = {**OPEN, **SHUT}
JSON = GrammarSpec("json_schema", json.dumps(SCHEMA, separators=(",", ":")))
ANY_OBJECT = GrammarSpec("json_schema", '{"type":"object"}')
REGEX = GrammarSpec("regex", "[0-9]{3}")


@pytest.mark.parametrize(
    ("grammar", "expected"),
    [
        ({"type": "json", "value": SCHEMA}, JSON),
        ({"type": "json", "value": json.dumps(SCHEMA)}, JSON),
        ({"type": "json_object", "value": SCHEMA}, JSON),
        ({"type": "json_schema", "value": {"name": "person", "schema": SCHEMA, "strict": True}}, JSON),
        ({"type": "regex", "value": "[0-9]{3}"}, REGEX),
    ],
)
def test_tgis_spellings_are_one_grammar(grammar: dict[str, Any], expected: GrammarSpec) -> None:
    assert native_grammar(grammar) == expected
    wanted = openai_grammar({"response_format": grammar})
    assert wanted is not None
    assert wanted == ("response_format", expected)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": SCHEMA}}}, JSON),
        ({"response_format": {"type": "json_object"}}, ANY_OBJECT),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, JSON),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "p"}}}, ANY_OBJECT),
        ({"guided_json": SCHEMA}, JSON),
        ({"guided_json": json.dumps(SCHEMA)}, JSON),
        ({"guided_regex": "[0-9]{3}"}, REGEX),
        ({"guided_choice": ["a", "ü", "a"]}, GrammarSpec("choice", '["a","ü"]')),
        ({"guided_grammar": "start: /a/"}, GrammarSpec("grammar", "start: /a/")),
        ({"structured_outputs": {"json": SCHEMA}}, JSON),
        ({"structured_outputs": {"regex": "[0-9]{3}", "json": None}}, REGEX),
        ({"structured_outputs": {"choice": ["a", "ü"]}}, GrammarSpec("choice", '["a","ü"]')),
        ({"structured_outputs": {"grammar": "start: /a/"}}, GrammarSpec("grammar", "start: /a/")),
        ({"structured_outputs": {"json_object": True, "disable_any_whitespace": False}}, ANY_OBJECT),
    ],
)
def test_openais_and_vllms_spellings(fields: dict[str, Any], expected: GrammarSpec) -> None:
    wanted = openai_grammar({"response_format": {"type": "text"}, **fields})
    assert wanted == (next(iter(fields)), expected)


def test_plain_text_is_no_grammar() -> None:
    assert openai_grammar({}) is None
    assert openai_grammar({"response_format": {"type": "text"}, "guided_json": None}) is None


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ({"type": "x", "value": "a"}, "`type` must be one of json, json_object, regex, json_schema. Given: x"),
        ({"type": "json"}, "`value` is missing"),
        ({"type": "json", "value": "{"}, "not JSON"),
        ({"type": "json", "value": {"type": "thing"}}, "#/type"),
        ({"type": "json_schema", "value": {"name": "x"}}, "`value` must have a `schema`"),
        ({"type": "json", "value": '{"properties": {"a": {}, "a": 1}}'}, "#/properties/a: the key is given twice"),
        ({"type": "json", "value": {"properties": {"a": {"uniqueItems": True}}}}, "#/properties/a/uniqueItems"),
    ],
)
def test_a_native_grammar_that_is_none_is_not_valid(grammar: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        native_grammar(grammar)
    assert str(caught.value).startswith("grammar is not valid: ")
    assert message in str(caught.value)
    assert caught.value.param == "grammar"


@pytest.mark.parametrize("grammar", [{"type": "json", "value": 3}, {"type": "regex", "value": {"a": 1}}])
def test_a_native_value_of_another_type_is_not_supported(grammar: dict[str, Any]) -> None:
    with pytest.raises(GrammarError, match=r"^grammar is not supported$"):
        native_grammar(grammar)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": {}}, "response_format", "`type`"),
        ({"response_format": {"type": "structural_tag"}}, "response_format", "structural_tag"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "`schema`"),
        ({"response_format": {"type": "json"}}, "response_format.value", "JSON schema"),
        ({"response_format": {"type": "regex"}}, "response_format.value", "regular expression"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://x/y"}}}},
         "response_format", "#/$ref"),
        ({"guided_json": {"properties": {"a": {"not": {"const": 1}}}}}, "guided_json", "#/properties/a/not"),
        ({"guided_json": "{"}, "guided_json", "not JSON"),
        ({"guided_choice": []}, "guided_choice", "list of texts"),
        ({"guided_choice": ["a", ""]}, "guided_choice", "list of texts"),
        ({"guided_choice": ["a"] * 1025}, "guided_choice", "up to 1024"),
        ({"guided_regex": ""}, "guided_regex", "regular expression"),
        ({"guided_grammar": " \n"}, "guided_grammar", "Lark or EBNF"),
        ({"guided_grammar": "root ::= \"\ud800\""}, "guided_grammar", "UTF-8"),
        ({"guided_choice": ["\ud800"]}, "guided_choice", "UTF-8"),
        ({"structured_outputs": {}}, "structured_outputs", "one of json, regex"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs", "one of json, regex"),
        ({"structured_outputs": {"whitespace_pattern": "x", "json": {}}}, "structured_outputs", "whitespace_pattern"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice", "list of texts"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "one grammar only"),
    ],
)  # fmt: skip
def test_what_is_no_grammar_is_refused_by_its_field(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        openai_grammar(fields)
    assert caught.value.param == param
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (OPEN, SCHEMA),
        (SCHEMA, SCHEMA),
        ({**OPEN, "additionalProperties": True}, {**OPEN, "additionalProperties": True}),
        ({**OPEN, "patternProperties": {"^x": {}}}, {**OPEN, "patternProperties": {"^x": {}}}),
        ({"type": "object"}, {"type": "object"}),
        ({"properties": {}}, {"properties": {}, "additionalProperties": False}),
        ({"type": "array", "items": OPEN}, {"type": "array", "items": SCHEMA}),
        ({"$ref": "#/$defs/a", "$defs": {"a": OPEN}}, {"$ref": "#/$defs/a", "$defs": {"a": SCHEMA}}),
        ({"properties": {"a": {"anyOf": [OPEN, {"type": "null"}]}}},
         {"properties": {"a": {"anyOf": [SCHEMA, {"type": "null"}]}}, "additionalProperties": False}),
        ({"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": OPEN}},
         {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": SCHEMA}}),
        ({"properties": {"a": {"allOf": [OPEN, OPEN]}, "b": {"properties": {"c": OPEN}}}},
         {"properties": {"a": {"allOf": [OPEN, OPEN]}, "b": {**SHUT, "properties": {"c": SCHEMA}}}, **SHUT}),
        ({"oneOf": [OPEN, {"type": "null"}]}, {"anyOf": [SCHEMA, {"type": "null"}]}),
        (True, {}),
    ],
)  # fmt: skip
def test_an_object_that_names_its_keys_has_no_others(schema: Any, expected: Any) -> None:
    assert json.loads(canonical(schema, close=True)) == expected


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [OPEN, {"properties": {"b": {}}, "required": ["b"]}]},
        {"$ref": "#/$defs/a", "properties": {"b": {}}, "$defs": {"a": OPEN}},
        {"anyOf": [OPEN, {"properties": {"b": {}}}], "required": ["c"]},
        {"oneOf": [OPEN, {"properties": {"b": {}}, "required": ["b"]}]},  # open, so not mutually exclusive
        {**OPEN, "required": ["name", "other"]},
        {"properties": {"a": {}}, "required": ["a"], "minProperties": 2},
        {**OPEN, "const": {"name": "a", "other": 1}},
        {"allOf": [{"$ref": "#/$defs/a"}, {"required": ["b"]}], "$defs": {"a": {"properties": {"x": OPEN}}}},
        {**OPEN, "dependentRequired": {"name": ["other"]}},
    ],
)
def test_what_another_schema_may_ask_for_is_not_shut_out(schema: Any) -> None:
    found = canonical(schema, close=True)
    assert "additionalProperties" not in found
    assert found == canonical(schema)
