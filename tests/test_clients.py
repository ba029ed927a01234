"""Clients in common use, against the real server with the mock engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import huggingface_hub
import openai
import pytest
from support_ports import unused_port
from support_server import TEXT, Server, byte_model, eventually


def start(tmp_path_factory: pytest.TempPathFactory, *options: str) -> Server:
    model = byte_model(tmp_path_factory.mktemp("model"))
    port = unused_port()
    return Server(model, port, "--mock-text", TEXT, "--max-total-tokens", "500", *options)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = start(tmp_path_factory, "--mock-step-ms", "1")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run a server with a key, which serves one request at a time."""
    running = start(tmp_path_factory, "--mock-step-ms", "20", "--api-key", "secret", "--max-concurrent-requests", "1")
    yield running
    running.stop()


@pytest.fixture
def busy(narrow: Server) -> Iterator[openai.OpenAI]:
    """Return a client of `narrow` while another's stream keeps it busy for about a second."""
    client = openai.OpenAI(base_url=narrow.url + "/v1", api_key="secret", max_retries=0)
    begun = threading.Event()

    def other() -> None:
        for _ in client.chat.completions.create(model="tgi", messages=MESSAGES, stream=True):  # type: ignore[arg-type]
            begun.set()

    thread = threading.Thread(target=other)
    thread.start()
    assert begun.wait(10)
    yield client
    thread.join()


MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="-", max_retries=0)


def test_openai_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tgi", messages=MESSAGES)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(TEXT.encode()) + 1


def test_openai_chat_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tgi", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, logprobs=True  # type: ignore[arg-type]
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == TEXT
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None


def test_openai_chat_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="tgi", messages=MESSAGES) as stream:  # type: ignore[arg-type]
        final = stream.get_final_completion()
    assert final.choices[0].message.content == TEXT


def test_openai_stream_helper_makes_messages_that_can_be_sent_back(client: openai.OpenAI) -> None:
    ask: Any = {"model": "tgi", "messages": MESSAGES, "n": 2, "stop": "l"}
    with client.chat.completions.stream(**ask) as stream:
        choices = stream.get_final_completion().choices
    assert [(choice.index, choice.message.role, choice.message.content) for choice in choices] == [
        (0, "assistant", "Zwö"), (1, "assistant", "Zwö"),
    ]  # fmt: skip
    for message in (choices[0].message, choices[0].message.model_dump()):
        later: Any = [*MESSAGES, message, *MESSAGES]
        assert client.chat.completions.create(model="tgi", messages=later, max_tokens=1).choices[0].message.content


def test_openai_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tgi", prompt=["a", "b"], max_tokens=5, logprobs=1)
    assert [choice.text for choice in answer.choices] == ["Zwöl", "Zwöl"]
    assert answer.choices[0].logprobs is not None
    stream = client.completions.create(model="tgi", prompt="a", max_tokens=5, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "Zwöl"


def test_openai_errors_have_its_classes(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tgi", messages=MESSAGES, temperature=-1)  # type: ignore[arg-type]
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


def test_openai_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id) == model


def test_openai_async_streams_at_once(server: Server) -> None:
    async def one(client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(model="tgi", messages=MESSAGES, stream=True)  # type: ignore[arg-type]
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="-") as client:
            return await asyncio.gather(*(one(client) for _ in range(32)))

    assert asyncio.run(main()) == [TEXT] * 32


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Allow huggingface_hub to use the network: the other tests forbid it, even on this machine."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


@pytest.mark.usefixtures("online")
def test_huggingface_text_generation(server: Server) -> None:
    client = huggingface_hub.InferenceClient(server.url)
    assert client.text_generation("x", max_new_tokens=5) == "xZwöl"  # POST / of TGI, and here, puts the prompt first
    assert client.text_generation("x", max_new_tokens=5, return_full_text=False) == "Zwöl"
    answer = client.text_generation(
        "x", max_new_tokens=5, details=True, decoder_input_details=True, do_sample=True, seed=3, return_full_text=False
    )
    assert (answer.generated_text, answer.details.seed, answer.details.generated_tokens) == ("Zwöl", 3, 5)
    assert answer.details.prefill[0].text == "x"
    events = list(client.text_generation("x", max_new_tokens=5, stream=True, details=True))
    assert "".join(event.token.text for event in events) == "Zwöl"
    assert events[-1].details is not None
    assert events[-1].details.finish_reason == "length"
    assert list(client.text_generation("x", max_new_tokens=3, stream=True)) == ["Z", "w", ""]


@pytest.mark.usefixtures("online")
def test_huggingface_chat(server: Server) -> None:
    client = huggingface_hub.InferenceClient(base_url=server.url)
    assert client.chat_completion(MESSAGES).choices[0].message.content == TEXT
    chunks = client.chat_completion(MESSAGES, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT


def test_openai_with_a_wrong_key(narrow: Server) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=narrow.url + "/v1", api_key="wrong").models.list()


def test_openai_waits_for_a_full_server(busy: openai.OpenAI) -> None:
    with pytest.raises(openai.RateLimitError) as caught:
        busy.completions.create(model="tgi", prompt="x", max_tokens=1)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    with pytest.raises(openai.RateLimitError):
        busy.completions.create(model="tgi", prompt="x", max_tokens=1, stream=True)
    patient = busy.with_options(max_retries=10)
    assert patient.completions.create(model="tgi", prompt="x", max_tokens=1).choices[0].text == "Z"


@pytest.mark.usefixtures("online", "busy")
def test_huggingface_knows_a_full_server(narrow: Server) -> None:
    hub = huggingface_hub.InferenceClient(narrow.url, token="secret")
    with pytest.raises(huggingface_hub.errors.OverloadedError):
        hub.text_generation("x", max_new_tokens=1)
    with pytest.raises(huggingface_hub.errors.OverloadedError):
        hub.text_generation("x", max_new_tokens=1, stream=True)


@pytest.mark.usefixtures("online")
def test_huggingface_sends_its_token_as_the_key(narrow: Server) -> None:
    hub = huggingface_hub.InferenceClient(narrow.url, token="secret")
    eventually(lambda: narrow.metric("tgi_batch_current_size") == 0)
    assert hub.text_generation("x", max_new_tokens=1) == "xZ"
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match="401"):
        huggingface_hub.InferenceClient(narrow.url, token="wrong").text_generation("x", max_new_tokens=1)
