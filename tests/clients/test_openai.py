"""The Python package openai: plain answers, streams, helpers, errors."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

openai = pytest.importorskip("openai")

MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]
LONG: Any = [{"role": "user", "content": "word " * 9000}]
ASK: Any = {"model": "tgi", "messages": MESSAGES, "max_tokens": 20, "temperature": 0}


@pytest.fixture
def client(v1: str) -> Any:
    return openai.OpenAI(base_url=v1, api_key="-", max_retries=0)


def test_chat(client: Any) -> None:
    answer = client.chat.completions.create(**ASK, logprobs=True, top_logprobs=3)
    (choice,) = answer.choices
    assert "Paris" in choice.message.content
    assert choice.finish_reason == "stop"
    assert len(choice.logprobs.content) == answer.usage.completion_tokens
    assert [one.top_logprobs[0].token for one in choice.logprobs.content] == [o.token for o in choice.logprobs.content]
    text = b"".join(bytes(one.bytes) for one in choice.logprobs.content).decode()
    assert text.startswith(choice.message.content)
    assert answer.id.startswith("chatcmpl-")


def test_chat_stream_adds_up_to_the_plain_answer(client: Any) -> None:
    plain = client.chat.completions.create(**ASK)
    chunks = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == plain.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], plain.usage.completion_tokens)
    assert len({chunk.id for chunk in chunks}) == 1


def test_chat_stream_helper(client: Any) -> None:
    plain = client.chat.completions.create(**ASK)
    with client.chat.completions.stream(**ASK) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == plain.choices[0].message.content
    assert final.choices[0].finish_reason == "stop"


def test_several_choices(client: Any) -> None:
    ask = ASK | {"n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 8}
    plain = client.chat.completions.create(**ask)
    assert [choice.index for choice in plain.choices] == [0, 1, 2]
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**ask, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in plain.choices]
    assert len(set(texts)) > 1


def test_stop_is_left_out_of_the_text(client: Any) -> None:
    for stop in ("is", ["zzz", "is"]):
        answer = client.chat.completions.create(**ASK, stop=stop)
        assert "is" not in answer.choices[0].message.content
        assert answer.choices[0].finish_reason == "stop"
        chunks = client.chat.completions.create(**ASK, stop=stop, stream=True)
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.choices[0].message.content


def test_logit_bias(client: Any) -> None:
    first = client.completions.create(model="tgi", prompt="The capital of France is", max_tokens=1, temperature=0)
    assert first.choices[0].text == " Paris"
    banned = client.completions.create(
        model="tgi", prompt="The capital of France is", max_tokens=1, temperature=0, logit_bias={"7042": -100}
    )
    assert banned.choices[0].text != " Paris"


def test_content_parts_and_tokens_wanted(client: Any) -> None:
    parts = [{"type": "text", "text": "What is the capital"}, {"type": "text", "text": " of France?"}]
    answer = client.chat.completions.create(
        model="tgi", messages=[{"role": "user", "content": parts}], max_completion_tokens=3
    )
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")


def test_completions(client: Any) -> None:
    prompts = ["The capital of France is", "1, 2, 3, 4,"]
    answer = client.completions.create(model="tgi", prompt=prompts, max_tokens=4, temperature=0, echo=True, logprobs=2)
    assert all(choice.text.startswith(prompt) for choice, prompt in zip(answer.choices, prompts, strict=True))
    for choice in answer.choices:
        logprobs = choice.logprobs
        assert logprobs.token_logprobs[0] is None
        assert "".join(logprobs.tokens) == choice.text
        for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
            assert choice.text[offset : offset + len(token)] == token
    texts = ["", ""]
    for chunk in client.completions.create(model="tgi", prompt=prompts, max_tokens=4, temperature=0, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [c.text.removeprefix(p) for c, p in zip(answer.choices, prompts, strict=True)]


def test_completions_of_token_ids(client: Any) -> None:
    ids = [504, 3575, 282, 4649, 314]
    first, *others = (
        client.completions.create(model="tgi", prompt=prompt, max_tokens=4, temperature=0).choices
        for prompt in ("The capital of France is", ids, [ids])
    )
    assert others == [first, first]


def test_models(client: Any) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id) == model


def test_errors_have_its_classes(client: Any) -> None:
    for more in ({}, {"stream": True}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**(ASK | {"temperature": -1}), **more)
        assert caught.value.param == "temperature"
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**(ASK | {"messages": LONG}), **more)
        assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


def test_images_are_refused_by_name(client: Any) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    with pytest.raises(openai.BadRequestError, match="image_url"):
        client.chat.completions.create(model="tgi", messages=[{"role": "user", "content": [part]}])


def test_raw_answers_carry_tgis_headers(client: Any) -> None:
    raw = client.chat.completions.with_raw_response.create(**ASK)
    usage = raw.parse().usage
    assert raw.headers["x-generated-tokens"] == str(usage.completion_tokens)
    assert raw.headers["x-prompt-tokens"] == str(usage.prompt_tokens)


def test_many_streams_at_once(client: Any, v1: str) -> None:
    want = client.chat.completions.create(**ASK).choices[0].message.content

    async def one(other: Any) -> str:
        stream = await other.chat.completions.create(**ASK, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=v1, api_key="-") as other:
            return await asyncio.gather(*(one(other) for _ in range(16)))

    assert set(asyncio.run(main())) == {want}
