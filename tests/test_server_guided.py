"""Answers under a grammar, end to end with the embedded model; refusals and their messages."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support_ports import unused_port
from support_server import Server, scripted
from support_slow import mostly_slow

from tokenmill import LLM
from tokenmill.config import default_cache_dir
from tokenmill.weights import embedded

USER = [{"role": "user", "content": "Tell me about the city of Paris."}]
CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "rivers": {"type": "integer", "minimum": 0, "maximum": 9},
        "size": {"enum": ["small", "large"]},
    },
    "required": ["name", "rivers", "size"],
}
CODE = "[A-Z]{2}-[0-9]{3}"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    path = embedded.resolve(default_cache_dir(), False, lambda progress: None).path
    running = Server(path, unused_port(), mock=False)
    yield running
    running.stop()


def is_city(text: str) -> bool:
    city = json.loads(text)
    good = len(city["name"]) <= 12 and city["rivers"] in range(10) and city["size"] in ("small", "large")
    return good and list(city) == ["name", "rivers", "size"]


def chat(server: Server, **fields: Any) -> Any:
    response = server.post("/v1/chat/completions", {"messages": USER, "max_tokens": 100, **fields})
    assert response.status_code == 200, response.text
    return response.json()


NATIVE = [
    {"type": "json", "value": CITY}, {"type": "json_object", "value": json.dumps(CITY)},
    {"type": "json_schema", "value": {"name": "city", "schema": CITY}},
]  # fmt: skip


@pytest.mark.parametrize("grammar", mostly_slow(NATIVE, NATIVE[1:2]))
def test_native_answers_follow_a_schema(server: Server, grammar: dict[str, Any]) -> None:
    parameters = {"grammar": grammar, "max_new_tokens": 100, "details": True, "do_sample": True, "seed": 3}
    body = {"inputs": "A city:", "parameters": parameters}
    plain = server.post("/generate", body).json()
    assert is_city(plain["generated_text"])
    assert plain["details"]["finish_reason"] == "eos_token"
    events = server.events("/generate_stream", body)
    assert events[-1]["generated_text"] == plain["generated_text"]
    assert [event["token"]["id"] for event in events] == [token["id"] for token in plain["details"]["tokens"]]


CAT = {"properties": {"kind": {"const": "cat"}, "lives": {"enum": [7, 9]}}, "required": ["kind"]}
DOG = {"properties": {"kind": {"const": "dog"}, "big": {"type": "boolean"}}, "required": ["kind"]}
MENAGERIE = {
    "type": "object",
    "properties": {
        "colors": {"type": "array", "items": {"$ref": "#/$defs/Color"}, "uniqueItems": True, "minItems": 2},
        "ages": {"type": "object", "propertyNames": {"$ref": "#/$defs/Color"}, "minProperties": 1,
                 "additionalProperties": {"type": "boolean"}},
        "pet": {"oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]},
    },
    "required": ["colors", "ages", "pet"],
    "$defs": {
        "Color": {"enum": ["red", "green", "blue"]},
        "Cat": {"type": "object", **CAT},
        "Dog": {"type": "object", **DOG},
    },
}  # fmt: skip


@pytest.mark.slow
def test_sets_records_and_unions_of_pydantic_are_exact(server: Server) -> None:
    oracle = pytest.importorskip("jsonschema").Draft202012Validator(MENAGERIE)
    for seed in range(2):
        body = chat(server, guided_json=MENAGERIE, temperature=1.3, seed=seed, max_tokens=200)
        answer = json.loads(body["choices"][0]["message"]["content"])
        oracle.validate(answer)
        assert set(answer["pet"]) <= {"kind", "lives", "big"}


def test_native_answers_match_a_regular_expression(server: Server) -> None:
    for seed in range(5):
        parameters = {"grammar": {"type": "regex", "value": CODE}, "do_sample": True, "seed": seed}
        text = server.post("/generate", {"inputs": "A code:", "parameters": parameters}).json()["generated_text"]
        assert re.fullmatch(CODE, text)


FORMS = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": CITY}}},
    {"response_format": {"type": "json", "value": CITY}},
    {"guided_json": CITY}, {"structured_outputs": {"json": CITY}},
]  # fmt: skip


@pytest.mark.parametrize("fields", mostly_slow(FORMS, FORMS[:1]))
def test_chats_follow_a_schema_however_it_is_asked_for(server: Server, fields: dict[str, Any]) -> None:
    body = chat(server, **fields, n=3, temperature=1.2, seed=1)
    for choice in body["choices"]:
        assert is_city(choice["message"]["content"])
        assert choice["finish_reason"] == "stop"
    assert chat(server, **fields, n=3, temperature=1.2, seed=1)["choices"] == body["choices"]
    *chunks, _ = server.events("/v1/chat/completions", {
        "messages": USER, "max_tokens": 100, "stream": True, "temperature": 1.2, "seed": 1, **fields
    })  # fmt: skip
    said = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
    assert said == body["choices"][0]["message"]["content"]


GUIDE = {
    "properties": {
        "location": {"title": "Location", "maxLength": 10},
        "activity": {"enum": ["bike", "walk"]},
        "animals_seen": {"format": "int32", "minimum": 1, "maximum": 5},
        "animals": {"items": {"properties": {"legs": {"minimum": 0}}, "required": ["legs"]}, "maxItems": 2},
    },
    "required": ["location", "activity", "animals_seen", "animals"],
}


def is_guides(text: str) -> bool:
    pytest.importorskip("jsonschema").Draft202012Validator(GUIDE).validate(found := json.loads(text))
    legs = [animal["legs"] for animal in found["animals"]]
    kinds = isinstance(found["location"], str), type(found["animals_seen"]) is int
    return all(kinds) and all(isinstance(number, int | float) for number in legs)


@pytest.mark.slow
def test_a_schema_without_types_gives_what_its_keywords_mean_however_it_is_sent(server: Server) -> None:
    """A small form of TGI's first documented example."""
    for seed, grammar in enumerate((
        {"type": "json", "value": GUIDE}, {"type": "json", "value": json.dumps(GUIDE)},
        {"type": "json_schema", "value": {"schema": {"allOf": [{"$ref": "#/$defs/g"}], "$defs": {"g": GUIDE}}}},
    )):  # fmt: skip
        parameters = {"grammar": grammar, "max_new_tokens": 200, "do_sample": True, "seed": seed}
        plain = server.post("/generate", {"inputs": "I saw a puppy", "parameters": parameters}).json()
        assert is_guides(plain["generated_text"])
    for fields in ({"response_format": {"type": "json_object", "schema": GUIDE}}, {"guided_json": GUIDE},
                   {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": GUIDE}}},
                   {"structured_outputs": {"json": GUIDE}}):  # fmt: skip
        (choice,) = chat(server, **fields, temperature=1.0, seed=1, max_tokens=200)["choices"]
        assert is_guides(choice["message"]["content"])
    for parameters in (GUIDE, {"anyOf": [GUIDE]}, {"$ref": "#/$defs/g", "$defs": {"g": GUIDE}}):
        tools = [{"type": "function", "function": {"name": "see", "parameters": parameters}}]
        (choice,) = chat(server, tools=tools, tool_choice="see", seed=1, max_tokens=200)["choices"]
        assert is_guides(choice["message"]["tool_calls"][0]["function"]["arguments"])
    anything = {"description": "Anything.", "maxProperties": 0}  # bounded, so that the call ends within max_tokens
    tools = [{"type": "function", "function": {"name": "see", "parameters": anything}}]
    (choice,) = chat(server, tools=tools, tool_choice="see", max_tokens=200)["choices"]
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {}


@pytest.mark.slow
def test_any_object_is_an_object(server: Server) -> None:
    (choice,) = chat(server, response_format={"type": "json_object"}, temperature=0)["choices"]
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)
    assert choice["message"]["content"].startswith("{")


def test_completions_follow_too(server: Server) -> None:
    body = {"prompt": ["A:", "B:"], "max_tokens": 20, "guided_choice": ["red", "blue"], "logprobs": 1}
    response = server.post("/v1/completions", body)
    assert response.status_code == 200, response.text
    for choice in response.json()["choices"]:
        assert choice["text"] in ("red", "blue")
        assert choice["finish_reason"] == "stop"


ARITHMETIC = r"""
root  ::= (expr "=" ws term "\n"){2}
expr  ::= term ([-+*/] term){0,3}
term  ::= num | "(" ws num [-+] num ")" ws
num   ::= [0-9]{1,2} ws
ws    ::= [ \t\n]{0,1}
"""


IN_EBNF = [{"guided_grammar": ARITHMETIC}, {"structured_outputs": {"grammar": ARITHMETIC}}]


@pytest.mark.parametrize("fields", mostly_slow(IN_EBNF, IN_EBNF[:1]))
def test_chats_follow_a_grammar_in_ebnf(server: Server, fields: dict[str, Any]) -> None:
    term = r"(\d{1,2}\s?|\(\s?\d{1,2}\s?[-+]\d{1,2}\s?\)\s?)"
    for seed in range(4):
        (choice,) = chat(server, **fields, seed=seed, temperature=1.0)["choices"]
        assert re.fullmatch(f"({term}([-+*/]{term}){{0,3}}=\\s?{term}\n){{2}}", choice["message"]["content"])
        assert choice["finish_reason"] == "stop"


def test_a_grammar_that_never_ends_ends_at_its_limit_and_the_server_goes_on(server: Server) -> None:
    endless = 'start: /[xy]/ A "b"\nA: /ab*/'
    (choice,) = chat(server, guided_grammar=endless, max_tokens=12)["choices"]
    assert re.fullmatch("[xy]ab*", choice["message"]["content"])
    assert choice["finish_reason"] == "length"


def test_a_receipt_tells_of_the_grammar_and_what_it_forced(server: Server) -> None:
    body = chat(server, guided_regex="abc{20}", receipt=True)
    assert body["choices"][0]["message"]["content"] == "ab" + "c" * 20
    receipt = body["receipt"]
    assert receipt["parameters"]["grammar"] == {"kind": "regex", "source": "abc{20}", "after": []}
    assert 0 < receipt["forced_tokens"] <= receipt["generated_tokens"]


WEATHER = {"type": "object", "properties": {"city": {"enum": ["Paris", "Oslo"]},
                                            "days": {"type": "integer", "minimum": 1, "maximum": 9}},
           "required": ["city", "days"]}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "get_time"}},
]


def check_call(function: dict[str, str]) -> None:
    arguments = json.loads(function["arguments"])
    if function["name"] == "get_weather":
        assert arguments["city"] in ("Paris", "Oslo")
        assert arguments["days"] in range(1, 10)
        assert len(arguments) == 2
    else:
        assert (function["name"], arguments) == ("get_time", {})


@pytest.mark.parametrize("choice", ["required", "get_weather", {"type": "function", "function": {"name": "get_time"}}])
def test_a_call_that_must_come_comes(server: Server, choice: Any) -> None:
    fields = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False, "temperature": 1.0, "seed": 5}
    (answer,) = chat(server, **fields)["choices"]
    (call,) = answer["message"]["tool_calls"]
    assert (answer["finish_reason"], answer["message"]["content"]) == ("tool_calls", None)
    check_call(call["function"])
    name = choice if isinstance(choice, str) else choice["function"]["name"]
    assert name in ("required", call["function"]["name"])
    *chunks, _ = server.events("/v1/chat/completions", {
        "messages": USER, "max_tokens": 100, "stream": True, **fields
    })  # fmt: skip
    pieces = [piece for chunk in chunks for piece in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert pieces[0]["function"]["name"] == call["function"]["name"]
    assert "".join(piece["function"]["arguments"] for piece in pieces) == call["function"]["arguments"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"guided_regex": "("}, "guided_regex"),
    ({"guided_regex": "(a|b"}, "guided_regex"),
    ({"guided_regex": "((a{1,1000}){1,1000}){1,1000}"}, "guided_regex"),
    ({"guided_grammar": "start: nothing"}, "guided_grammar"),
    ({"guided_grammar": "root ::= nothing"}, "guided_grammar"),
    ({"guided_grammar": "root ::= " + "(" * 120_000 + ")" * 120_000}, "guided_grammar"),
    ({"structured_outputs": {"grammar": 'root ::= "x" root | ' + "[a-z]* " * 30_000}}, "structured_outputs"),
    ({"guided_json": {"type": "object", "properties": {f"p{i}": {"type": "string", "description": "x" * 50}
                                                       for i in range(12_000)}}}, "guided_json"),
    ({"guided_json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}},
     "guided_json"),
    ({"guided_json": json.loads("{\"items\":" * 150 + "{}" + "}" * 150)}, "guided_json"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"if": {}, "then": False}}}},
     "response_format"),
    ({"tools": TOOLS, "tool_choice": "get_wether"}, "tool_choice"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {"const": 1}}}}],
      "tool_choice": "required"}, "tools[0].function.parameters"),
]  # fmt: skip


def test_invalid_grammars_are_refused_soon_and_delay_no_stream(server: Server) -> None:
    """Meanwhile another stream goes on without a pause."""
    chat(server, guided_regex="a")  # starts the pool
    gaps: list[float] = []

    def listen() -> None:
        body = {"messages": USER, "max_tokens": 400, "stream": True, "ignore_eos": True, "temperature": 0}
        with httpx.stream("POST", server.url + "/v1/chat/completions", json=body, timeout=60) as response:
            last = 0.0
            for _ in response.iter_lines():
                now = time.monotonic()
                gaps.append(now - last if last else 0.0)
                last = now

    listener = threading.Thread(target=listen)
    listener.start()
    for number, (fields, param) in enumerate(BAD):
        begun, stream = time.monotonic(), number % 2 == 1
        response = server.post("/v1/chat/completions", {"messages": USER, "max_tokens": 9, "stream": stream, **fields})
        took = time.monotonic() - begun
        assert response.status_code == 400, (fields, response.text)
        assert response.json()["error"]["param"] == param, response.text
        assert took < 5, (param, took)
    listener.join()
    assert len(gaps) > 800  # lines, two a chunk
    assert max(gaps) < 4  # a refusal that is waited for in the event loop takes seconds each time; a busy machine, one


def test_bad_grammars_are_tgis_errors_on_its_routes(server: Server) -> None:
    for route in ("/generate", "/generate_stream"):
        response = server.post(route, {"inputs": "x", "parameters": {"grammar": {"type": "regex", "value": "("}}})
        assert response.status_code == 422
        assert response.json()["error_type"] == "validation"
        assert response.json()["error"].startswith("Input validation error: ")


def test_grammars_can_be_turned_off(tmp_path: Path) -> None:
    with scripted(tmp_path, "--disable-grammar-support", total=3000) as running:
        native = running.post("/generate", {"inputs": "x", "parameters": {"grammar": {"type": "regex", "value": "a"}}})
        assert native.status_code == 422
        assert native.json()["error"] == "Input validation error: grammar is not supported"
        for fields, param in [
            ({"guided_choice": ["a"]}, "guided_choice"), ({"response_format": {"type": "json_object"}},
             "response_format"), ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
        ]:  # fmt: skip
            response = running.post("/v1/chat/completions", {"messages": USER, **fields})
            assert response.status_code == 400
            assert response.json()["error"]["message"] == "grammar is not supported"
            assert response.json()["error"]["param"] == param
        auto = running.post("/v1/chat/completions", {"messages": USER, "tools": TOOLS, "max_tokens": 1})
        assert auto.status_code == 200


@pytest.mark.slow
def test_the_offline_api_follows_grammars_too() -> None:
    with LLM() as llm:
        (answer,) = llm.generate("A code:", grammar={"type": "regex", "value": CODE}, max_new_tokens=20)
    assert re.fullmatch(CODE, answer.text)
    assert answer.finish_reason == "stop"
