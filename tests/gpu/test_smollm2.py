"""The default model on a GPU: the same answers as on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
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
BEGUN = [*CHATS[0], {"role": "assistant", "content": "The capital of France"}]  # without, two answers tie to 0.08
CPU = {"device": "cpu", "backend": "torch", "dtype": "float32"}
TEXT = (
    "The capital of France is Paris. Paris lies on the river Seine, and its best known building is the Eiffel Tower, "
    "which was built for the World's Fair of 1889. Every year, millions of people visit the city."
)


def model(**options: Any) -> LLM:
    return LLM(max_total_tokens=1024, max_batch_size=8, **options)


def answers(llm: LLM, *, alike: bool) -> list[tuple[int, ...]]:
    """Return greedy answers. `alike`: they must be batch-invariant."""
    together = [a.token_ids for a in llm.chat(CHATS, max_new_tokens=60)]
    if alike:
        assert [llm.chat(chat, max_new_tokens=60)[0].token_ids for chat in CHATS] == together
    return together


def log_probabilities(llm: LLM) -> np.ndarray[Any, Any]:
    """Return the model's log-probabilities of the tokens of a text."""
    (found,) = llm.generate(TEXT, max_new_tokens=1, prompt_logprobs=0)
    return np.array([detail.logprob for detail in found.prompt_logprobs if detail is not None])


def test_greedy_answers_in_float32_are_those_of_the_cpu_token_for_token() -> None:
    with model(device="cuda", dtype="float32") as gpu, model(**CPU) as cpu:
        assert answers(gpu, alike=True) == answers(cpu, alike=True)
        np.testing.assert_allclose(log_probabilities(gpu), log_probabilities(cpu), atol=0.01)


@pytest.mark.parametrize("options", [{}, {"deterministic": True}, {"kv_cache_dtype": "fp8_e4m3fn"}])
def test_in_half_precision_a_text_is_as_likely_as_on_the_cpu(options: dict[str, Any]) -> None:
    with model(**CPU) as cpu:
        expected = log_probabilities(cpu)
    with model(device="cuda", dtype="bfloat16", **options) as gpu:
        answers(gpu, alike=bool(options.get("deterministic")))
        assert gpu.chat(BEGUN, max_new_tokens=2)[0].text.strip() == "is Paris"
        error = np.abs(log_probabilities(gpu) - expected)
    assert error.mean() < 0.08  # 0.03 by rounding alone, on the CPU
    assert error.max() < 0.5
