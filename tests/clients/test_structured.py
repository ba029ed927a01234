"""Structured answers and tool calls, by the helpers of openai, instructor and langchain.

The model is small, so only the structure is checked, and the schemas limit the lengths.
"""

from __future__ import annotations

import asyncio
import json
from enum import StrEnum
from typing import Any, Literal

import pytest

openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")


class Size(StrEnum):
    """The size of a city."""

    small = "small"
    large = "large"


class City(pydantic.BaseModel):
    """A city."""

    name: Literal["Paris", "London", "Oslo"]
    size: Size
    rivers: int = pydantic.Field(ge=0, le=9)
    capital: bool


class GetWeather(pydantic.BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "London", "Oslo"]
    days: int = pydantic.Field(ge=1, le=9)


MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]
ASK: Any = {"model": "tgi", "messages": MESSAGES, "max_tokens": 100, "temperature": 0}


@pytest.fixture
def client(v1: str) -> Any:
    return openai.OpenAI(base_url=v1, api_key="-", max_retries=0)


def weather() -> Any:
    return openai.pydantic_function_tool(GetWeather, name="get_weather")


def test_openai_parses_the_answer_into_a_model(client: Any) -> None:
    answer = client.chat.completions.parse(**ASK, response_format=City)
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, City)
    assert choice.message.parsed == City.model_validate_json(choice.message.content)


def test_openai_parses_a_stream(client: Any) -> None:
    with client.chat.completions.stream(**ASK, response_format=City) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    assert "content.delta" in kinds
    assert kinds[-1] == "content.done"
    assert final.message.parsed == client.chat.completions.parse(**ASK, response_format=City).choices[0].message.parsed


def test_openai_parses_a_call(client: Any) -> None:
    answer = client.chat.completions.parse(**ASK, tools=[weather()], tool_choice="required", parallel_tool_calls=False)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather"
    assert isinstance(call.function.parsed_arguments, GetWeather)


def test_openais_helper_for_streams_puts_calls_together(client: Any) -> None:
    ask = {**ASK, "tools": [weather()], "tool_choice": {"type": "function", "function": {"name": "get_weather"}}}
    plain = client.chat.completions.create(**ask).choices[0].message.tool_calls
    with client.chat.completions.stream(**ask) as stream:
        events = list(stream)
        calls = stream.get_final_completion().choices[0].message.tool_calls
    pieces = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert "".join(event.arguments_delta for event in pieces) == plain[0].function.arguments
    assert [(call.function.name, call.function.arguments) for call in calls] == [
        (call.function.name, call.function.arguments) for call in plain
    ]
    assert isinstance(calls[0].function.parsed_arguments, GetWeather)
    assert calls[0].id.startswith("call_")


def test_a_conversation_goes_on_with_what_a_tool_said(client: Any) -> None:
    ask = {**ASK, "tools": [weather()]}
    message = client.chat.completions.create(**ask, tool_choice="required").choices[0].message
    result = [{"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in message.tool_calls]
    answer = client.chat.completions.create(**{**ask, "messages": [*MESSAGES, message, *result], "max_tokens": 5})
    assert answer.usage.completion_tokens > 0


def test_openais_older_functions(client: Any) -> None:
    function = {"name": "get_weather", "parameters": GetWeather.model_json_schema()}
    answer = client.chat.completions.create(**ASK, functions=[function], function_call={"name": "get_weather"})
    assert answer.choices[0].finish_reason == "function_call"
    GetWeather.model_validate_json(answer.choices[0].message.function_call.arguments)


def test_vllms_fields(client: Any) -> None:
    for more, allowed in [
        ({"guided_choice": ["red", "blue"]}, ["red", "blue"]),
        ({"guided_regex": "[1-3]{2}"}, [f"{a}{b}" for a in "123" for b in "123"]),
        ({"guided_grammar": 'start: "a" | "b" "c"'}, ["a", "bc"]),
        ({"structured_outputs": {"choice": ["red", "blue"]}}, ["red", "blue"]),
    ]:
        assert client.chat.completions.create(**ASK, extra_body=more).choices[0].message.content in allowed
        answer = client.completions.create(model="tgi", prompt="A", max_tokens=10, extra_body=more)
        assert answer.choices[0].text in allowed


def test_what_cannot_be_followed_is_openais_error(client: Any) -> None:
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "not": {"a": 1}}}}
    for more in ({}, {"stream": True}):
        with pytest.raises(openai.BadRequestError, match="#/not") as caught:
            client.chat.completions.create(**ASK, response_format=bad, **more)
        assert caught.value.param == "response_format"
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**ASK, extra_body={"guided_regex": "("}, **more)
        assert caught.value.param == "guided_regex"


def test_many_shapes_at_once(v1: str) -> None:
    async def one(client: Any, i: int) -> None:
        if i % 3 == 0:
            answer = await client.chat.completions.parse(**ASK, response_format=City)
            assert answer.choices[0].message.parsed
        elif i % 3 == 1:
            answer = await client.chat.completions.create(**ASK, extra_body={"guided_regex": f"x{{{i}}}"})
            assert answer.choices[0].message.content == "x" * i
        else:
            answer = await client.chat.completions.create(**ASK)
            assert "Paris" in answer.choices[0].message.content

    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=v1, api_key="-", max_retries=0) as client:
            await asyncio.gather(*(one(client, i) for i in range(1, 19)))

    asyncio.run(main())


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_instructor(client: Any, mode: str) -> None:
    instructor = pytest.importorskip("instructor")
    made = instructor.from_openai(client, mode=instructor.Mode[mode])
    assert isinstance(made.create(response_model=City, **ASK, max_retries=0), City)


def test_langchain(v1: str) -> None:
    chat = pytest.importorskip("langchain_openai").ChatOpenAI(
        base_url=v1, api_key="-", model="tgi", temperature=0, max_tokens=100, max_retries=0
    )
    for method in ("json_schema", "function_calling"):
        assert isinstance(chat.with_structured_output(City, method=method).invoke("Paris?"), City)
    model = chat.bind_tools([weather()], tool_choice="required", parallel_tool_calls=False)
    plain = model.invoke("Paris?").tool_calls
    whole: Any = None
    for chunk in model.stream("Paris?"):
        whole = chunk if whole is None else whole + chunk
    for calls in (plain, whole.tool_calls):
        assert [(call["name"], GetWeather.model_validate(call["args"])) for call in calls] == [
            (call["name"], GetWeather.model_validate(call["args"])) for call in plain
        ]


def test_huggingface_hub(url: str, online: None) -> None:
    client = pytest.importorskip("huggingface_hub").InferenceClient(url)
    schema = City.model_json_schema()
    for grammar in ({"type": "json", "value": schema}, {"type": "json", "value": json.dumps(schema)}):
        text = client.text_generation("A city:", grammar=grammar, max_new_tokens=100, return_full_text=False)
        City.model_validate_json(text)
    answer = client.chat_completion(MESSAGES, tools=[weather()], tool_choice="required", max_tokens=100)
    (call,) = answer.choices[0].message.tool_calls[:1]
    GetWeather.model_validate_json(call.function.arguments)
    told = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    City.model_validate_json(
        client.chat_completion(MESSAGES, response_format=told, max_tokens=100).choices[0].message.content
    )
    arguments = ""
    for chunk in client.chat_completion(
        MESSAGES, tools=[weather()], tool_choice="get_weather", max_tokens=100, stream=True
    ):
        for piece in chunk.choices[0].delta.tool_calls or []:
            arguments += piece.function.arguments
    assert GetWeather.model_validate_json(arguments)


def test_text_generation(url: str) -> None:
    text_generation = pytest.importorskip("text_generation")
    client = text_generation.Client(url, timeout=60)
    grammar = text_generation.types.Grammar(type=text_generation.types.GrammarType.Regex, value="[0-9]{2}-[ab]")
    answer = client.generate("A code:", grammar=grammar, max_new_tokens=10)
    assert answer.generated_text[2:] in ("-a", "-b")
    assert answer.details.finish_reason == "eos_token"
    last = list(client.generate_stream("A code:", grammar=grammar, max_new_tokens=10))[-1]
    assert last.generated_text == answer.generated_text
    with pytest.raises(text_generation.errors.ValidationError, match="grammar is not valid"):
        client.generate("x", grammar={"type": "json", "value": {"type": "thing"}})
