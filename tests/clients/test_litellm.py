"""litellm: as an OpenAI-compatible server, and through its provider for TGI."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

litellm = pytest.importorskip("litellm")

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
PROMPT = "The capital of France is"


@pytest.fixture
def ask(v1: str) -> dict[str, Any]:
    return {"api_base": v1, "api_key": "-", "max_tokens": 20, "temperature": 0, "num_retries": 0}


@pytest.mark.parametrize("model", ["openai/tgi", "hosted_vllm/tgi", "custom_openai/tgi"])
def test_chat(ask: dict[str, Any], model: str) -> None:
    plain = litellm.completion(model=model, messages=MESSAGES, **ask)
    assert "Paris" in plain.choices[0].message.content
    assert plain.choices[0].finish_reason == "stop"
    assert plain.usage.total_tokens == plain.usage.prompt_tokens + plain.usage.completion_tokens
    chunks = list(
        litellm.completion(model=model, messages=MESSAGES, **ask, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == plain.choices[0].message.content
    assert [c.usage.completion_tokens for c in chunks if getattr(c, "usage", None)] == [plain.usage.completion_tokens]
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]


def test_logprobs_and_choices(ask: dict[str, Any]) -> None:
    answer = litellm.completion(
        model="openai/tgi", messages=MESSAGES, **(ask | {"temperature": 1, "max_tokens": 4}), n=2, logprobs=True,
        top_logprobs=2, seed=1, stop=["zzz"],
    )  # fmt: skip
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert [len(one.top_logprobs) for one in choice.logprobs.content] == [2] * len(choice.logprobs.content)


def test_text_completion(ask: dict[str, Any]) -> None:
    ask = ask | {"max_tokens": 5}
    plain = litellm.text_completion(model="text-completion-openai/tgi", prompt=PROMPT, **ask)
    assert plain.choices[0].text.startswith(" Paris")
    stream = litellm.text_completion(model="text-completion-openai/tgi", prompt=PROMPT, **ask, stream=True)
    assert "".join(chunk.choices[0].text or "" for chunk in stream) == plain.choices[0].text


def test_errors_have_its_classes(ask: dict[str, Any]) -> None:
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(model="openai/tgi", messages=MESSAGES, **(ask | {"temperature": -1}))
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(model="openai/tgi", messages=[{"role": "user", "content": "word " * 9000}], **ask)


def test_asynchronous(ask: dict[str, Any]) -> None:
    async def main() -> None:
        plain = await litellm.acompletion(model="openai/tgi", messages=MESSAGES, **ask)
        stream = await litellm.acompletion(model="openai/tgi", messages=MESSAGES, **ask, stream=True)
        texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(texts) == plain.choices[0].message.content

    asyncio.run(main())


def test_its_provider_huggingface(url: str) -> None:
    answer = litellm.completion(
        model="huggingface/tgi", messages=MESSAGES, api_base=url, api_key="-", max_tokens=20, temperature=0
    )
    assert "Paris" in answer.choices[0].message.content
