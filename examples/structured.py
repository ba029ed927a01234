"""Answers of a given shape, and calls of tools: `pip install openai`, `python examples/structured.py [URL]`."""

import json
import sys
from typing import Literal

from openai import BadRequestError, OpenAI
from pydantic import BaseModel, Field

URL = "http://127.0.0.1:3000/v1"


class City(BaseModel):
    """A city, as the answer is to describe it."""

    name: str = Field(max_length=20)
    country: Literal["France", "Norway", "Japan"]
    rivers: int = Field(ge=0, le=9)


def get_weather(city: str, days: int) -> str:
    return f"{city}, {days} days: rain"


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Paris", "Oslo"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


def main() -> None:
    client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else URL, api_key="-")
    messages = [{"role": "user", "content": "Tell me about Paris, and its weather."}]

    # The answer is a City: a grammar leaves the model no other tokens.
    answer = client.chat.completions.parse(model="tgi", messages=messages, response_format=City, max_tokens=100)
    print(repr(answer.choices[0].message.parsed))

    # One of a few words, a regular expression, a grammar: what OpenAI does not know goes into `extra_body`.
    for shape in ({"guided_choice": ["sun", "rain"]}, {"guided_regex": r"\d{2} °C"}):
        answer = client.chat.completions.create(model="tgi", messages=messages, extra_body=shape)
        print(repr(answer.choices[0].message.content))

    # A call that must come, in the model's own format; then what the function said goes back. "auto" lets it choose.
    answer = client.chat.completions.create(
        model="tgi", messages=messages, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False
    )
    messages.append(answer.choices[0].message)
    for call in answer.choices[0].message.tool_calls:
        said = get_weather(**json.loads(call.function.arguments))
        print(call.function.name, said)
        messages.append({"role": "tool", "tool_call_id": call.id, "content": said})
    answer = client.chat.completions.create(model="tgi", messages=messages, tools=[WEATHER], max_tokens=40)
    print(answer.choices[0].message.content)

    # What cannot be followed exactly is refused, with the place in the schema.
    schema = {"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True}}}
    try:
        client.chat.completions.create(model="tgi", messages=messages, extra_body={"guided_json": schema})
    except BadRequestError as error:
        print(f"{error.param}: {error.message}")


if __name__ == "__main__":
    main()
