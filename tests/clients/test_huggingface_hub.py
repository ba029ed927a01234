"""huggingface_hub.InferenceClient and AsyncInferenceClient."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

huggingface_hub = pytest.importorskip("huggingface_hub")

from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import BadRequestError, ValidationError

pytestmark = pytest.mark.usefixtures("online")
PROMPT = "The capital of France is"
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client(url: str) -> InferenceClient:
    return InferenceClient(url)


def test_text_generation(client: InferenceClient) -> None:
    whole = client.text_generation(PROMPT, max_new_tokens=6)
    assert whole.startswith(PROMPT + " Paris"), "as POST / of TGI where no pipeline tag is known"
    assert client.text_generation(PROMPT, max_new_tokens=6, return_full_text=False) == whole.removeprefix(PROMPT)


def test_text_generation_with_details(client: InferenceClient) -> None:
    answer = client.text_generation(
        PROMPT, details=True, decoder_input_details=True, max_new_tokens=6, top_n_tokens=2, return_full_text=False
    )
    details = answer.details
    assert details is not None
    assert details.top_tokens is not None
    assert (details.finish_reason, details.generated_tokens, details.seed) == ("length", 6, None)
    assert "".join(token.text for token in details.tokens) == answer.generated_text
    assert "".join(token.text for token in details.prefill) == PROMPT
    assert len(details.top_tokens) == 6


def test_text_generation_with_every_parameter(client: InferenceClient) -> None:
    def ask() -> Any:
        return client.text_generation(
            PROMPT,
            details=True,
            decoder_input_details=True,
            do_sample=True,
            frequency_penalty=0.1,
            max_new_tokens=6,
            repetition_penalty=1.1,
            return_full_text=False,
            seed=7,
            stop=["\n\n\n"],
            temperature=0.7,
            top_k=20,
            top_n_tokens=2,
            top_p=0.9,
            truncate=4,
            typical_p=0.95,
        )

    first = ask()
    assert first == ask()
    assert (first.details.seed, len(first.details.prefill)) == (7, 4)


def test_text_generation_stream(client: InferenceClient) -> None:
    whole = client.text_generation(PROMPT, max_new_tokens=6, return_full_text=False)
    assert "".join(client.text_generation(PROMPT, max_new_tokens=6, stream=True)) == whole
    events = list(client.text_generation(PROMPT, max_new_tokens=6, stream=True, details=True))
    assert [event.index for event in events] == [1, 2, 3, 4, 5, 6]
    assert "".join(event.token.text for event in events) == whole
    assert events[-1].generated_text == PROMPT + whole
    assert events[-1].details is not None
    assert (events[-1].details.finish_reason, events[-1].details.input_length) == ("length", 5)


def test_text_generation_errors(client: InferenceClient) -> None:
    for more in ({}, {"stream": True}):
        with pytest.raises(ValidationError, match="`temperature` must be strictly positive"):
            client.text_generation("x", temperature=-1.0, **more)
    with pytest.raises(ValidationError, match="adapter_id"):
        client.text_generation("x", adapter_id="nobody")


def test_chat_completion(client: InferenceClient) -> None:
    answer = client.chat_completion(
        MESSAGES,
        max_tokens=20,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        frequency_penalty=0.0,
        presence_penalty=0.0,
        logit_bias={"5": -100},
        n=1,
        seed=3,
        stop=["zzz"],
        top_p=0.9,
    )
    (choice,) = answer.choices
    assert choice.message.content is not None
    assert "Paris" in choice.message.content
    assert choice.logprobs is not None
    assert len(choice.logprobs.content) == answer.usage.completion_tokens
    assert all(len(one.top_logprobs) == 2 for one in choice.logprobs.content)


def test_chat_completion_stream(client: InferenceClient) -> None:
    whole = client.chat_completion(MESSAGES, max_tokens=20, temperature=0)
    chunks = list(
        client.chat_completion(
            MESSAGES, max_tokens=20, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


@pytest.mark.parametrize("more", [{}, {"provider": "hf-inference"}])
def test_addresses_that_people_give(url: str, more: dict[str, Any]) -> None:
    for client in (InferenceClient(url, **more), InferenceClient(url + "/", **more)):
        assert client.chat.completions.create(messages=MESSAGES, max_tokens=2).usage.completion_tokens == 2
        assert client.text_generation(PROMPT, max_new_tokens=1) == PROMPT + " Paris"
    for base in (url, url + "/v1", url + "/v1/"):
        client = InferenceClient(base_url=base, api_key="-")
        assert client.chat.completions.create(messages=MESSAGES, max_tokens=2).usage.completion_tokens == 2


def test_chat_completion_errors(client: InferenceClient) -> None:
    for more in ({}, {"stream": True}):
        with pytest.raises(BadRequestError, match="temperature"):
            client.chat_completion(MESSAGES, temperature=-1.0, **more)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_information_and_health(url: str) -> None:
    client = InferenceClient(url, provider="hf-inference")
    information = client.get_endpoint_info()
    wanted = {
        "model_id": str,
        "max_concurrent_requests": int,
        "max_best_of": int,
        "max_stop_sequences": int,
        "max_input_tokens": int,
        "max_total_tokens": int,
        "validation_workers": int,
        "max_client_batch_size": int,
        "router": str,
        "version": str,
    }
    assert {name: type(information[name]) for name in wanted} == wanted
    assert {"model_sha", "model_pipeline_tag", "sha", "docker_label"} <= information.keys()
    if hasattr(client, "health_check"):  # until huggingface_hub 1.0
        assert client.health_check() is True


def test_async_client(url: str) -> None:
    async def main() -> None:
        async with AsyncInferenceClient(url) as client:
            whole = await client.text_generation(PROMPT, max_new_tokens=5, return_full_text=False)
            stream = await client.text_generation(PROMPT, max_new_tokens=5, stream=True)
            assert "".join([text async for text in stream]) == whole
            chat = await client.chat_completion(MESSAGES, max_tokens=5, temperature=0)
            chunks = await client.chat_completion(MESSAGES, max_tokens=5, temperature=0, stream=True)
            texts = [chunk.choices[0].delta.content or "" async for chunk in chunks]
            assert "".join(texts) == chat.choices[0].message.content

    asyncio.run(main())
