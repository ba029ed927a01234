"""Keywords without a grammar are served by enumeration of cases, exactly as `jsonschema` validates, or refused."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
from support_grammar import accepts, backend, compact, made, small_vocabulary
from support_slow import mostly_slow

jsonschema = pytest.importorskip("jsonschema")

from bench.grammar import Play, Player  # noqa: E402
from tokenmill.errors import GrammarError  # noqa: E402
from tokenmill.grammar import schema  # noqa: E402
from tokenmill.grammar.base import Grammar  # noqa: E402

Oracle = jsonschema.Draft202012Validator
GUIDANCE = backend()

VALUES: list[Any] = [1, 2, 0, -3, 1.5, "a", "b", "ab", "", True, False, None]
OBJECTS: list[Any] = [
    dict(zip(names, values, strict=True))
    for size in range(4) for names in itertools.combinations(["a", "b", "c", "dd"], size)
    for values in itertools.product([1, "a", True], repeat=size)
]  # fmt: skip
ITEMS = ["a", "b", 1, True, None]
ARRAYS: list[Any] = [list(items) for size in range(4) for items in itertools.product(ITEMS, repeat=size)]
UNIVERSE = [*VALUES, *OBJECTS, *ARRAYS]


def served(value: Any, *, close: bool = False) -> Grammar:
    return made(GUIDANCE, "json_schema", schema.canonical(value, close=close))


def accepts_in_some_order(grammar: Grammar, instance: Any) -> bool:
    """Return True if a grammar accepts the value. Its objects have their keys in the order of the schema."""
    if not isinstance(instance, dict):
        return accepts(grammar, compact(instance))
    return any(accepts(grammar, compact(dict(items))) for items in itertools.permutations(instance.items()))


def check_exact(value: Any, universe: list[Any]) -> tuple[int, int]:
    """Assert that the grammar accepts exactly the valid instances. Return the numbers of valid and invalid ones."""
    grammar = served(value)
    oracle = (jsonschema.Draft7Validator if "dependencies" in value else Oracle)(value)
    valid = [instance for instance in universe if oracle.is_valid(instance)]
    taken = [instance for instance in universe if accepts_in_some_order(grammar, instance)]
    assert list(map(compact, taken)) == list(map(compact, valid)), value
    for seed in range(6):
        play = Play(grammar, Player(small_vocabulary(), seed), small_vocabulary(), most=200)
        assert not play.finished or oracle.is_valid(json.loads(play.text)), (value, play.text)
    return len(valid), len(universe) - len(valid)


NUMBER, TEXT = {"type": "integer"}, {"type": "string"}
COLOR = {"$defs": {"color": {"enum": ["a", "b", "c"], "type": "string", "title": "Color"}}}
ABC = {"a": NUMBER, "b": {}, "c": {"enum": [1, "a"]}}
CLOSED = {"type": "object", "properties": ABC, "additionalProperties": False}
CASES: list[dict[str, Any]] = [
    # pydantic's dict[Literal[…], int], dict[Color, int]; zod's records
    {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": NUMBER},
    {"type": "object", "propertyNames": {"$ref": "#/$defs/color"}, "additionalProperties": NUMBER, **COLOR},
    {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {}, "required": ["a", "b"]},
    {"type": "object", "propertyNames": {"const": "a"}, "minProperties": 1},
    {"propertyNames": {"enum": ["b", "a", 5]}, "properties": {"a": NUMBER, "c": TEXT}}, {"propertyNames": False},
    {"propertyNames": {"enum": ["b", "a"]}, "properties": {"a": NUMBER}, "additionalProperties": False},
    {"type": "object", "propertyNames": {"pattern": "^[ab]"}, "additionalProperties": NUMBER},
    {"type": "object", "propertyNames": {"minLength": 2}, "additionalProperties": NUMBER},
    {"type": "object", "propertyNames": {"type": "string", "minLength": 1, "maxLength": 1}, "minProperties": 1},
    # pydantic's set[Literal[…]], set[Color], set[bool], conset
    {"type": "array", "uniqueItems": True, "items": {"enum": ["a", "b"], "type": "string"}},
    {"type": "array", "uniqueItems": True, "items": {"$ref": "#/$defs/color"}, "minItems": 1, "maxItems": 2, **COLOR},
    {"type": "array", "uniqueItems": True, "items": {"type": "boolean"}},
    {"type": ["array", "null"], "uniqueItems": True, "items": {"anyOf": [{"const": 1}, {"const": None}]}},
    {"type": "array", "uniqueItems": True, "items": {"enum": [1, 1.0, True, "a"]}},
    {"type": "array", "uniqueItems": True, "maxItems": 1, "items": TEXT},
    {"type": "array", "uniqueItems": False, "items": TEXT},
    # number of keys
    {**CLOSED, "minProperties": 1}, {**CLOSED, "minProperties": 2, "required": ["b"]}, {**CLOSED, "maxProperties": 1},
    {**CLOSED, "minProperties": 1, "maxProperties": 1}, {**CLOSED, "minProperties": 3}, {**CLOSED, "maxProperties": 2},
    {**CLOSED, "minProperties": 1, "maxProperties": 2}, {**CLOSED, "maxProperties": 0},
    {**CLOSED, "minProperties": 2, "anyOf": [{"required": ["a"]}, {"properties": {"b": NUMBER}}]},
    # names of keys
    {**CLOSED, "dependentRequired": {"a": ["b"]}}, {**CLOSED, "dependencies": {"a": ["b"], "b": ["a", "c"]}},
    {"type": "object", "properties": {"a": NUMBER, "b": NUMBER}, "dependentRequired": {"a": ["b"]}},
    {**CLOSED, "required": ["a"], "dependentRequired": {"a": ["c"]}},
    # conditions
    {**CLOSED, "required": ["c"], "if": {"properties": {"c": {"const": 1}}}, "then": {"required": ["a"]}},
    {**CLOSED, "if": {"properties": {"c": {"const": 1}}, "required": ["c"]}, "then": {"required": ["a"]},
     "else": {"properties": {"b": NUMBER}}},
    {**CLOSED, "if": {"properties": {"c": {"enum": [1, 9]}}}, "then": {"properties": {"b": TEXT}}, "else": False},
    {**CLOSED, "required": ["c"], "allOf": [
        {"if": {"properties": {"c": {"const": 1}}}, "then": {"required": ["a"]}},
        {"if": {"properties": {"c": {"const": "a"}}}, "then": {"properties": {"b": {"type": "boolean"}}}},
    ]},
    # mutually exclusive alternatives
    {"oneOf": [NUMBER, TEXT, {"type": "null"}]}, {"oneOf": [{"const": "a"}, {"enum": ["b", 1]}, {"type": "boolean"}]},
    {"oneOf": [{"type": "integer", "maximum": 0}, {"type": "number", "exclusiveMinimum": 0}]},
    {"oneOf": [{"type": "string", "maxLength": 1}, {"type": "string", "minLength": 2}]},
    {"oneOf": [{"type": "array", "maxItems": 1}, {"type": "array", "minItems": 2, "items": TEXT}]},
    {"oneOf": [{**CLOSED, "required": ["a"]}, {"type": "object", "properties": {"a": TEXT}, "required": ["a"]}]},
    {"oneOf": [{"type": "object", "required": ["dd"]}, CLOSED]},
    {"oneOf": [{"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]},
               {"type": "object", "properties": {"a": {"const": "a"}, "b": NUMBER}, "required": ["a", "b"]}]},
    {"oneOf": [{"$ref": "#/$defs/color"}, {"anyOf": [NUMBER, {"type": "array", "items": {"const": 1}}]}], **COLOR},
    {"oneOf": [{"type": "string", "enum": ["a"]}, {"type": "string", "const": "b"}], "anyOf": [{"const": "a"}, NUMBER]},
    # no instance is valid
    {"type": "array", "items": {"not": {}}}, {**CLOSED, "properties": {"a": {"not": True}, "b": NUMBER}},
]  # fmt: skip


@pytest.mark.parametrize("value", CASES)
def test_what_is_served_by_cases_is_exact(value: Any) -> None:
    valid, invalid = check_exact(value, UNIVERSE)
    assert valid
    assert invalid


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"type": "array", "uniqueItems": True, "items": TEXT}, "#/uniqueItems: `uniqueItems` can be served only where"),
    ({"type": "array", "uniqueItems": True, "items": {"enum": list("abcdefg")}}, "no more than 2000 arrays"),
    ({"type": "array", "uniqueItems": True, "items": {"enum": list(range(9000))}}, "no more than 2000 arrays"),
    ({"type": "array", "uniqueItems": True, "items": {"enum": ["x" * 9000, "y", "z", "u", "v"]}}, "too many cases"),
    ({"type": "array", "uniqueItems": True, "items": {"enum": ["a"]}, "minItems": 2}, "no valid array"),
    ({"uniqueItems": True, "items": {"enum": ["a"]}}, "#/uniqueItems"), ({"uniqueItems": 1}, "#/uniqueItems: expected"),
    ({"type": "array", "uniqueItems": True, "prefixItems": [{"const": 1}], "items": {"const": 2}}, "#/uniqueItems"),
    ({"propertyNames": {"pattern": "^a"}, "properties": {"b": {}}}, "#/propertyNames"),
    ({"propertyNames": {"pattern": "^a", "minLength": 3}}, "one pattern, format or length"),
    ({"propertyNames": {"enum": ["a"]}, "required": ["b"]}, "a name that is required"),
    ({"propertyNames": {"enum": [f"n{i}" for i in range(300)]}, "additionalProperties": {"const": "x" * 2000}},
     "#/propertyNames: `propertyNames` needs too many cases"),
    ({"propertyNames": {"$ref": "#anchor"}}, "#/propertyNames"), ({"propertyNames": {"$ref": "#"}}, "#/propertyNames"),
    ({**CLOSED, "minProperties": 4}, "#/minProperties: `minProperties` is met by no object"),
    ({**CLOSED, "properties": {f"p{i}": {} for i in range(20)}, "minProperties": 9}, "too many cases"),
    ({**CLOSED, "dependentRequired": {"a": "b"}}, "#/dependentRequired/a: expected a list"),
    ({**CLOSED, "dependencies": {"a": {"required": ["b"]}}}, "#/dependencies/a"),
    ({**CLOSED, "if": {"properties": {"a": {"const": 1}}}, "then": False}, "#/if: `if` can be served where it asks"),
    ({**CLOSED, "if": {"required": ["a"]}, "then": False}, "#/if"),
    ({"properties": ABC, "if": {"properties": {"c": {"const": 1}}}, "then": False}, "for objects only"),
    ({**CLOSED, "if": {"properties": {"c": {"const": 1}}, "required": ["a"]}, "then": False}, "alone"),
]  # fmt: skip


@pytest.mark.parametrize("value, why", REFUSED)
def test_what_needs_too_many_cases_is_refused_by_keyword_and_path(value: Any, why: str) -> None:
    with pytest.raises(GrammarError) as caught:
        schema.canonical(value, "guided_json")
    assert why in str(caught.value)
    assert caught.value.param == "guided_json"


@pytest.mark.parametrize("alternatives", [
    [NUMBER, {"type": "number"}], [TEXT, {"const": "a"}], [{"enum": ["a", 1]}, {"enum": [1.0, "b"]}],
    [{"type": "integer", "maximum": 1}, {"type": "integer", "minimum": 1}], [{"maxLength": 1}, {"minLength": 2}],
    [{"type": "object", "properties": {"a": NUMBER}}, {"type": "object", "properties": {"a": TEXT}, "required": ["b"]}],
    [{"properties": {"a": {"const": 1}}, "required": ["a"]}, {"properties": {"a": {"const": 2}}, "required": ["a"]}],
    [{"type": "object", "patternProperties": {"^a$": TEXT}, "additionalProperties": False},
     {"type": "object", "required": ["a"]}],
    [{"type": "string", "pattern": "^a"}, {"type": "string", "pattern": "b$"}],
])  # fmt: skip
def test_alternatives_that_may_share_a_value_stay_one_of(alternatives: Any) -> None:
    assert "oneOf" in json.loads(schema.canonical({"oneOf": alternatives}))


def random_schema(draw: random.Random) -> dict[str, Any]:
    """Return the schema of an object or array with the keywords above."""
    simple: list[Any] = [NUMBER, TEXT, {"enum": [1, "a"]}, {"const": True}, True, {"type": ["boolean", "integer"]}]
    if draw.random() < 0.25:
        made: dict[str, Any] = {"type": "array", "uniqueItems": draw.random() < 0.8}
        made["items"] = draw.choice([{"enum": draw.sample(ITEMS, 3)}, {"type": "boolean"}, {"const": "a"}])
        return made | ({"maxItems": draw.randint(0, 3)} if draw.random() < 0.5 else {})
    names = draw.sample(["a", "b", "c"], draw.randint(1, 3))
    made = {"type": "object", "properties": {name: draw.choice(simple) for name in names}}
    made["required"] = [name for name in names if draw.random() < 0.3]
    if draw.random() < 0.7:
        made["additionalProperties"] = False
        made |= {"minProperties": draw.randint(0, len(names))} if draw.random() < 0.5 else {}
        made |= {"maxProperties": draw.randint(len(made["required"]), 3)} if draw.random() < 0.3 else {}
    if draw.random() < 0.4:
        made["dependentRequired"] = {draw.choice(names): draw.sample(["a", "b", "c"], draw.randint(1, 2))}
    if draw.random() < 0.3:
        made["propertyNames"] = {"enum": draw.sample(["a", "b", "c", "dd"], 3)}
    if draw.random() < 0.4:
        made["properties"]["c"] = {"enum": [1, "a", True]}
        condition = {"properties": {"c": {"enum": draw.sample([1, "a", True], draw.randint(1, 2))}}}
        made["if"] = condition | ({"required": ["c"]} if draw.random() < 0.5 else {})
        made[draw.choice(["then", "else"])] = {"required": [draw.choice(names)]}
    return made


@pytest.mark.parametrize("part", mostly_slow(range(3), [0]))
def test_random_schemas_of_these_keywords_are_exact_or_refused(part: int) -> None:
    num_served = 0
    for seed in range(40 * part, 40 * part + 40):
        draw = random.Random(seed)
        value = random_schema(draw)
        if draw.random() < 0.3:
            value = {"oneOf": [value, random_schema(draw), {"type": "null"}]}
        try:
            served(value)
        except GrammarError:
            continue
        check_exact(value, UNIVERSE)
        num_served += 1
    assert num_served > 20


def test_bounds_beyond_what_floats_tell_apart_are_drawn_in() -> None:
    for kind, far in itertools.product(("integer", "number"), (2**53, 2**63 - 1, 2**64 - 1, 10**25)):
        for value in ({"minimum": -far}, {"maximum": far}, {"exclusiveMinimum": -far - 1, "exclusiveMaximum": far + 1}):
            grammar, oracle = served({"type": kind, **value}), Oracle({"type": kind, **value})
            for near in (0, 7, 2**53 - 1, 2**53, 2**53 + 1, 2**62, 2**63 - 1024, 2**63 - 1, 2**63, 10**19, 10**25, far):
                for instance in (near, -near, near + 1, near - 1, 1 - near):
                    if accepts(grammar, str(instance)):
                        assert oracle.is_valid(instance), (kind, value, instance)
            assert accepts(grammar, "9007199254740991")
            assert accepts(grammar, "-9007199254740991")
    wide = served({"type": "integer", "minimum": 2**53 + 1, "maximum": 2**63 - 1})  # ids of 64 bits
    assert accepts(wide, "1234567890123456789")
    assert not accepts(wide, str(2**53))
    for value in ({"minimum": 2**63}, {"maximum": -(10**30)}, {"type": "number", "minimum": 2**60}):
        with pytest.raises(GrammarError, match=f"#/{'minimum' if 'minimum' in value else 'maximum'}: a bound beyond"):
            served(value)


@pytest.mark.parametrize("pattern, good, bad", [
    (r"^(?=.*[A-Z])(?=.*\d).{3,6}$", ["aB1", "1aaaaB"], ["ab1", "AB", "aB12345", "abc"]),
    (r"^(?=a|b)[^)(?=|]+", ["ab", "b"], ["ca", ""]),
    (r"^(?=.{1,3}\.?$)[a-z.]+$", ["abc", "abc."], ["abcd", "ab.ab"]),
])  # fmt: skip
def test_lookaheads_at_the_beginning_are_further_patterns(pattern: str, good: list[str], bad: list[str]) -> None:
    value = {"type": "string", "pattern": pattern}
    grammar, oracle = served(value), Oracle(value)
    assert [text for text in good if not (accepts(grammar, compact(text)) and oracle.is_valid(text))] == []
    assert [text for text in bad if accepts(grammar, compact(text)) or oracle.is_valid(text)] == []
    for other in (r"^(?=a)b|c", r"(?=a)b", r"^(?!a)b", r"a(?=b)"):
        with pytest.raises(GrammarError, match="lookahead"):
            served({"type": "string", "pattern": other})


def test_names_in_a_format_are_a_pattern() -> None:
    for name, good in (("uuid", "F47ac10b-58cc-4372-a567-0e02b2c3d479"), ("date", "2024-02-29")):
        grammar = served({"type": "object", "propertyNames": {"format": name}, "additionalProperties": NUMBER})
        assert accepts(grammar, compact({good: 1}))
        assert [one for one in ({good[:-1]: 1}, {"a": 1}, {good: "1"}) if accepts(grammar, compact(one))] == []


def test_formats_that_say_nothing_of_a_text_are_left_out() -> None:
    for name in ("password", "binary", "path", "file-path"):
        assert schema.canonical({"type": "string", "format": name}) == '{"type":"string"}'
    told = {"type": "string", "format": "ulid", "pattern": "^[0-7][0-9A-Z]{25}$"}  # zod writes the pattern
    assert json.loads(schema.canonical(told)) == {"type": "string", "pattern": "^[0-7][0-9A-Z]{25}$"}
    grammar = served({"type": "string", "format": "uuid4"})
    assert accepts(grammar, '"f47ac10b-58cc-4372-a567-0e02b2c3d479"')
    assert not accepts(grammar, '"f47ac10b-58cc-3372-a567-0e02b2c3d479"')
    grammar = served({"type": "string", "format": "base64"})
    assert [text for text in ("", "aGk=", "aA==", "aGkh") if not accepts(grammar, compact(text))] == []
    assert [text for text in ("a", "aGk", "a=b=", "aGk!") if accepts(grammar, compact(text))] == []
    labels = ["a" * 63] * 3
    assert accepts(served({"type": "string", "format": "hostname"}), compact(".".join(labels)))
    assert not accepts(served({"type": "string", "format": "hostname"}), compact(".".join([*labels, "a" * 63])))
    for name in ("iri", "regex"):
        with pytest.raises(GrammarError, match="#/format"):
            schema.canonical({"type": "string", "format": name, "pattern": "a"})
