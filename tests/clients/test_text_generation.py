"""text-generation, TGI's first client: Client and AsyncClient."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support_ports import unused_port
from support_server import TEXT, Server, byte_model

text_generation = pytest.importorskip("text_generation")

from text_generation.errors import OverloadedError, ValidationError
from text_generation.types import BestOfSequence, FinishReason, Message

from .conftest import SERVER_PYTHON

PROMPT = "The capital of France is"


@pytest.fixture
def client(url: str) -> Any:
    return text_generation.Client(url, timeout=60)


def test_generate(client: Any) -> None:
    answer = client.generate(PROMPT, max_new_tokens=8, decoder_input_details=True, top_n_tokens=2)
    details = answer.details
    assert answer.generated_text.startswith(" Paris")
    assert answer.generated_text == "".join(token.text for token in details.tokens)
    assert (details.finish_reason, details.generated_tokens, details.seed) == (FinishReason.Length, 8, None)
    assert "".join(token.text for token in details.prefill) == PROMPT
    assert [token.logprob is None for token in details.prefill] == [True] + [False] * (len(details.prefill) - 1)
    assert [top[0].id for top in details.top_tokens] == [token.id for token in details.tokens]
    assert all(len(top) >= 2 and top[0].logprob >= top[1].logprob for top in details.top_tokens)
    assert details.best_of_sequences is None


def test_generate_stream(client: Any) -> None:
    whole = client.generate(PROMPT, max_new_tokens=8)
    events = list(client.generate_stream(PROMPT, max_new_tokens=8, top_n_tokens=2))
    assert [event.token.id for event in events] == [token.id for token in whole.details.tokens]
    assert [event.generated_text for event in events] == [None] * 7 + [whole.generated_text]
    assert [event.details is None for event in events] == [True] * 7 + [False]
    assert (events[-1].details.finish_reason, events[-1].details.generated_tokens) == (FinishReason.Length, 8)
    assert all(event.top_tokens[0].id == event.token.id for event in events)


def test_every_parameter(client: Any) -> None:
    parameters = {
        "do_sample": True,
        "max_new_tokens": 6,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.1,
        "return_full_text": True,
        "seed": 42,
        "stop_sequences": ["\n\n\n"],
        "temperature": 0.8,
        "top_k": 20,
        "top_p": 0.9,
        "truncate": 4,
        "typical_p": 0.95,
        "decoder_input_details": True,
        "top_n_tokens": 1,
    }
    first = client.generate(PROMPT, **parameters)
    assert first == client.generate(PROMPT, **parameters)
    assert first.generated_text.startswith(PROMPT), "the text as it was sent, not as it was cut"
    assert (first.details.seed, len(first.details.prefill)) == (42, 4)


def test_stop_sequences_end_the_text(client: Any) -> None:
    answer = client.generate("1, 2, 3, 4,", max_new_tokens=30, stop_sequences=[" 7"])
    assert answer.generated_text == " 5, 6, 7"
    assert answer.details.finish_reason == FinishReason.StopSequence


def test_best_of(client: Any) -> None:
    answer = client.generate(PROMPT, best_of=2, do_sample=True, max_new_tokens=4)
    others = answer.details.best_of_sequences
    assert len(others) == 1
    assert all(isinstance(other, BestOfSequence) for other in others)

    def mean(tokens: Any) -> float:
        return sum(token.logprob for token in tokens) / len(tokens)

    assert mean(answer.details.tokens) >= max(mean(other.tokens) for other in others)
    assert len({answer.details.seed, *(other.seed for other in others)}) == 2


@pytest.mark.parametrize(
    "prompt, parameters, message",
    [
        ("x", {"stop_sequences": list("abcde")}, "supports up to 4 stop sequences. Given: 5"),
        ("x", {"top_n_tokens": 50}, "`top_n_tokens` must be >= 0 and <= 5. Given: 50"),
        ("word " * 9000, {}, "`inputs`"),
        ("x", {"max_new_tokens": 9000, "truncate": 9000}, "`truncate` must be strictly positive and less than"),
    ],
)
def test_errors(client: Any, prompt: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        client.generate(prompt, **parameters)
    with pytest.raises(ValidationError, match=message):
        list(client.generate_stream(prompt, **parameters))


def test_chat(client: Any) -> None:
    messages = [Message(role="user", content="What is the capital of France?")]
    answer = client.chat(messages=messages, max_tokens=20, temperature=0.0, logprobs=True, top_logprobs=2, seed=1)
    (choice,) = answer.choices
    assert "Paris" in choice.message.content
    assert "".join(one["token"] for one in choice.logprobs["content"]).startswith(choice.message.content)
    assert answer.usage["total_tokens"] == answer.usage["prompt_tokens"] + answer.usage["completion_tokens"]
    # Its streaming chat demands `tool_calls` in each delta and reads `[DONE]` as JSON: it can read no server's stream.


def test_async_client(client: Any, url: str) -> None:
    async def main() -> None:
        other = text_generation.AsyncClient(url, timeout=60)
        answer = await other.generate(PROMPT, max_new_tokens=5)
        assert answer == client.generate(PROMPT, max_new_tokens=5)
        events = [event async for event in other.generate_stream(PROMPT, max_new_tokens=5)]
        assert events[-1].generated_text == answer.generated_text
        chat = await other.chat(messages=[Message(role="user", content="Hi")], max_tokens=4, temperature=0.0)
        assert chat.usage["completion_tokens"] == 4
        with pytest.raises(ValidationError):
            await other.generate("x", stop_sequences=list("abcde"))
        crowd = await asyncio.gather(*(other.generate(PROMPT, max_new_tokens=5) for _ in range(8)))
        assert {one.generated_text for one in crowd} == {answer.generated_text}

    asyncio.run(main())


@pytest.fixture
def narrow(tmp_path: Path) -> Iterator[Server]:
    """Run a server with the mock engine and a key, which serves one request at a time."""
    options = ("--mock-text", TEXT, "--mock-step-ms", "20", "--api-key", "secret", "--max-concurrent-requests", "1")
    running = Server(byte_model(tmp_path), unused_port(), *options, python=SERVER_PYTHON)
    yield running
    running.stop()


def test_a_full_server_is_overloaded_until_the_other_stream_ends(narrow: Server) -> None:
    client = text_generation.Client(narrow.url, headers={"Authorization": "Bearer secret"}, timeout=60)
    other = client.generate_stream("x", max_new_tokens=60)
    first = next(other)
    with pytest.raises(OverloadedError):
        client.generate("x", max_new_tokens=1)
    with pytest.raises(OverloadedError):
        list(client.generate_stream("x", max_new_tokens=1))
    assert (first.token.text + "".join(event.token.text for event in other)).startswith("Zwölf")
    assert client.generate("x", max_new_tokens=1).generated_text == "Z"
