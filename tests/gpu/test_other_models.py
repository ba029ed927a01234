"""Models that transformers computes, and an encoder and decoder, on a GPU: the same text as transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import support_encoded
from support_cuda import ON_GPU, torch
from support_models import make_checkpoint

from tokenmill.backends.kind import BackendOptions
from tokenmill.parallel.group import Group
from tokenmill.runtime.assembly import EngineOptions, assemble
from tokenmill.runtime.offline import OfflineEngine
from tokenmill.weights.source import local_source
from tokenmill.wire.messages import StoppingParams

pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
PROMPTS = [[5, 6, 7], list(range(1, 60)), [9] * 11]


def text_of(folder: Path, backend: str, prompts: list[list[int]], **more: Any) -> list[list[int]]:
    chosen = BackendOptions(backend=backend, device="cuda", **more)
    options = EngineOptions(backend=chosen, memory_limit=1 << 30, max_batch_tokens=16)
    with OfflineEngine(assemble(local_source(folder), options, Group(), lambda progress: None)) as engine:
        assert (engine.info.device, engine.info.backend) == ("cuda", "cuda" if backend == "auto" else backend)
        return engine.generate(prompts, None, StoppingParams(12))


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_transformers_models(family: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, family)
    found = text_of(tmp_path, "transformers", PROMPTS)
    for prompt, ids in zip(PROMPTS, found, strict=True):
        given = torch.tensor([prompt])
        made = model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=12,
                              eos_token_id=None, pad_token_id=0)  # fmt: skip
        assert ids == made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["t5", "flan-t5"])
def test_an_encoder_and_decoder(family: str, tmp_path: Path) -> None:
    model = support_encoded.save(tmp_path, family)
    found = text_of(tmp_path, "torch", [[*prompt, support_encoded.START] for prompt in PROMPTS])
    for prompt, ids in zip(PROMPTS, found, strict=True):
        given = torch.tensor([prompt])
        made = model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=12,
                              eos_token_id=None, use_cache=False)  # fmt: skip
        assert ids == made[0, 1:].tolist()
