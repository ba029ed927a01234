"""The default model on a GPU: what it says there is what it says on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
from support_cuda import ON_GPU

from tokenmill.config import default_cache_dir
from tokenmill.llm import LLM
from tokenmill.weights import embedded

pytestmark = [
    pytest.mark.skipif(not ON_GPU, reason="needs a GPU"),
    pytest.mark.skipif(embedded.find(default_cache_dir()) is None, reason="the default model is not on this machine"),
]
QUESTIONS = ["What is the capital of France?", "Name three primary colours.", "Write one sentence about the sea."]
CHATS = [[{"role": "user", "content": question}] for question in QUESTIONS]


def answers(**options: Any) -> list[tuple[int, ...]]:
    with LLM(max_total_tokens=1024, max_batch_size=8, **options) as llm:
        together = llm.chat(CHATS, max_new_tokens=60)
        alone = [llm.chat(chat, max_new_tokens=60)[0] for chat in CHATS]
    if options["dtype"] == "float32" or options.get("deterministic"):
        assert [a.token_ids for a in alone] == [a.token_ids for a in together]
    assert "Paris" in together[0].text
    return [a.token_ids for a in together]


def test_greedy_answers_in_float32_are_those_of_the_cpu_token_for_token() -> None:
    assert answers(device="cuda", dtype="float32") == answers(device="cpu", backend="torch", dtype="float32")


@pytest.mark.parametrize("options", [{}, {"deterministic": True}, {"kv_cache_dtype": "fp8_e4m3fn"}])
def test_in_half_precision_it_knows_the_capital_of_france(options: dict[str, Any]) -> None:
    for found in answers(device="cuda", dtype="bfloat16", **options):
        assert len(found) > 3
