"""langchain-huggingface (HuggingFaceEndpoint, ChatHuggingFace) and langchain-openai (ChatOpenAI, OpenAI)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

PROMPT = "The capital of France is"
QUESTION = "What is the capital of France?"


@pytest.fixture
def endpoint(url: str, online: None) -> Any:
    return pytest.importorskip("langchain_huggingface").HuggingFaceEndpoint(
        endpoint_url=url, max_new_tokens=6, temperature=0, huggingfacehub_api_token="-"
    )


@pytest.fixture
def chat(v1: str) -> Any:
    return pytest.importorskip("langchain_openai").ChatOpenAI(
        base_url=v1, api_key="-", model="tgi", temperature=0, max_tokens=20, max_retries=0
    )


def test_huggingface_endpoint(endpoint: Any) -> None:
    plain = endpoint.invoke(PROMPT)
    assert plain.removeprefix(PROMPT).startswith(" Paris")
    assert "".join(endpoint.stream(PROMPT)) == plain.removeprefix(PROMPT)
    assert endpoint.invoke("1, 2, 3, 4,", stop=[" 6"]).endswith(" 5,")  # it cuts the stop string off itself


def test_huggingface_endpoint_asynchronous(endpoint: Any) -> None:
    async def main() -> None:
        plain = await endpoint.ainvoke(PROMPT)
        assert plain.removeprefix(PROMPT) == "".join([text async for text in endpoint.astream(PROMPT)])

    asyncio.run(main())


def test_huggingface_chat(endpoint: Any) -> None:
    from langchain_huggingface import ChatHuggingFace

    model = ChatHuggingFace(llm=endpoint, model_id="tgi").bind(max_tokens=20, temperature=0)
    plain = model.invoke(QUESTION)
    assert "Paris" in plain.content
    assert "".join(chunk.content for chunk in model.stream(QUESTION)) == plain.content


def test_openai_chat(chat: Any) -> None:
    from langchain_core.messages import HumanMessage, SystemMessage

    messages = [SystemMessage("You are a helpful AI assistant."), HumanMessage(QUESTION)]
    plain = chat.invoke(messages)
    assert "Paris" in plain.content
    assert plain.response_metadata["finish_reason"] == "stop"
    chunks = list(chat.stream(messages, stream_usage=True))
    assert "".join(chunk.content for chunk in chunks) == plain.content
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert total.usage_metadata["output_tokens"] == plain.usage_metadata["output_tokens"]
    assert [one.content for one in chat.batch([messages, messages])] == [plain.content] * 2


def test_openai_chat_with_logprobs_and_stop(chat: Any) -> None:
    answer = chat.bind(logprobs=True, top_logprobs=2).invoke(QUESTION, stop=["is"])
    assert "is" not in answer.content
    assert len(answer.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2


def test_openai_completions(v1: str) -> None:
    module = pytest.importorskip("langchain_openai")
    model = module.OpenAI(base_url=v1, api_key="-", model="tgi", temperature=0, max_tokens=5, max_retries=0)
    plain = model.invoke(PROMPT)
    assert plain.startswith(" Paris")
    assert "".join(model.stream(PROMPT)) == plain
    assert model.generate([PROMPT, "1, 2, 3, 4,"]).generations[1][0].text.startswith(" 5")
