"""An encoder and a decoder on a GPU: real shapes in half precision, through graphs, against torch in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support_encoded
from safetensors.torch import save_file
from support_cuda import ON_GPU, cuda_job, torch
from test_other_models import PROMPTS, text_of

if ON_GPU:
    from support_rank_processes import Processes, answers

from bench.gpu.shapes import FLAN_T5_LARGE
from bench.gpu.tensors import shapes_of
from tokenmill.backends.base import Admitted, StepInputs, StepLimits
from tokenmill.backends.cuda.encoded import EncoderDecoderBackend
from tokenmill.backends.torch import encoded as by_torch
from tokenmill.models.base import program_of
from tokenmill.parallel.group import Group
from tokenmill.quant.base import reader_of
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source
from tokenmill.wire.messages import Request, SamplingParams, StoppingParams

pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
LARGE = FLAN_T5_LARGE | {"num_layers": 3, "num_decoder_layers": 3, "vocab_size": 8192}
SMALL = LARGE | {"d_model": 512, "d_ff": 1024, "num_heads": 6}
FIRST = LARGE | {"d_kv": 128, "num_heads": 8, "feed_forward_proj": "relu", "tie_word_embeddings": True}
UMT5 = LARGE | {"model_type": "umt5"}
LIMITS, BLOCKS = StepLimits(2048, 40, 1024, 16), 1200
Rows = list[tuple[int, int, int]]  # slot, first position and number of tokens


def write(folder: Path, config: dict[str, Any]) -> None:
    """Write random weights with which every part of the model counts."""
    draw, made = torch.Generator().manual_seed(0), {}
    for name, shape in shapes_of(program_of(config)).items():
        spread = 0.5 if "relative_attention_bias" in name else 1.0 if name == "shared.weight" else shape[-1] ** -0.5
        spread *= config["d_kv"] ** -0.25 if name.endswith((".q.weight", "SelfAttention.k.weight")) else 1.0
        drawn = torch.randn(shape, generator=draw) * (spread if len(shape) > 1 else 0.1)
        made[name] = drawn + (1.0 if len(shape) == 1 else 0.0)
    save_file(made, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


class Torch(by_torch.EncoderDecoderBackend):
    """The reference, with the logits of its last step."""

    logits: Any

    def _sample(self, inputs: StepInputs, state: Any, env: Any) -> Any:
        self.logits = self._interpreter.tail(state, env)
        return super()._sample(inputs, state, env)


class Both:
    """Two backends that are fed with the same steps: tokens are known beforehand, whatever is sampled."""

    def __init__(self, folder: Path, dtype: str, **options: Any) -> None:
        source = open_checkpoint(local_source(folder))
        program, quantize = program_of(source.config), options.get("quantize", "")
        found = cuda_job(program, source, LIMITS, dtype, read=reader_of(source, quantize), **options)
        self.backends = EncoderDecoderBackend(found), Torch(cuda_job(program, source, LIMITS, "float32"))
        for backend in self.backends:
            backend.allocate(BLOCKS)
        self.backends[0].warm_up()
        free, draw = np.random.default_rng(3).permutation(BLOCKS).tolist(), np.random.default_rng(0)
        self.admitted, blocks = [], []
        for slot in range(LIMITS.max_batch_size):
            length = (700, 1, 64, 129, 300)[slot] if slot < 5 else int(draw.integers(2, 260))
            prompt = (*draw.integers(2, 8000, length).tolist(), 0)
            request = Request(slot, prompt, SamplingParams(), StoppingParams(99))
            ids = np.array([*prompt, *draw.integers(2, 8000, 90)], np.int32)
            self.admitted.append(Admitted(slot, request, ids))
            blocks += [(0, slot, i, free.pop()) for i in range(-(-len(ids) // 16))]
        self.blocks = np.array(blocks, np.int32)

    def length(self, slot: int) -> int:
        """Return the number of tokens of a slot's input."""
        return len(self.admitted[slot].request.prompt_ids) - 1

    def off(self, rows: Rows) -> float:
        """Run a step with both and return the largest relative difference of a row's logits."""
        slots, starts, counts = np.array(rows, np.int32).T
        known = np.array([(a.slot, i, t) for a in self.admitted for i, t in enumerate(a.token_ids)], np.int32)
        new = tuple(a for a in self.admitted if (a.slot, 0) in {(slot, start) for slot, start, _ in rows})
        inputs = StepInputs(slots, starts, counts, np.arange(len(rows), dtype=np.int32), new, self.blocks, known)
        found, wanted = (self._logits(backend, inputs) for backend in self.backends)
        return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())

    @staticmethod
    def _logits(backend: Any, inputs: StepInputs) -> Any:
        backend.run(inputs).result()
        return backend.logits[: len(inputs.slots)].float().clone()

    def history(self) -> list[Rows]:
        """Return steps: whole inputs, an input in two pieces beside decoding, runs of the decoder, decoding."""
        n = self.length
        steps: list[Rows] = [[(0, 0, n(0) + 1), (1, 0, 2), (2, 0, n(2) + 1)], [(0, n(0) + 1, 1), (1, 2, 1)]]
        steps += [[(0, n(0) + 2, 1), (3, 0, n(3) + 1), (4, 0, n(4) + 40), (2, n(2) + 1, 7)], [(0, n(0) + 3, 1)]]
        steps += [[(i, 0, n(i) + 1) for i in some] for some in (range(5, 12), range(12, 19), range(19, 26))]
        return [*steps, *([(i, n(i) + 1 + done, 1) for i in range(5, 26)] for done in range(3))]


@pytest.mark.parametrize("config, dtype, options, most", [
    (LARGE, "bfloat16", {}, 0.03), (SMALL, "float16", {}, 5e-3), (FIRST, "float32", {}, 1e-4),
    (UMT5, "bfloat16", {"deterministic": True}, 0.03), (LARGE, "bfloat16", {"kv_cache_dtype": "fp8_e4m3fn"}, 0.08),
    (LARGE, "bfloat16", {"quantize": "int8"}, 0.05), (LARGE, "bfloat16", {"quantize": "fp8"}, 0.1),
])  # fmt: skip
def test_real_shapes_get_the_logits_of_torch(
    config: dict[str, Any], dtype: str, options: dict[str, Any], most: float, tmp_path: Path
) -> None:
    write(tmp_path, config)
    both = Both(tmp_path, dtype, **options)
    found = [both.off(rows) for rows in both.history()]
    print(f"{dtype} {options}: {max(found):.5f}")
    assert max(found) < most, found


def test_a_deterministic_sequence_has_the_same_logits_alone_and_resumed(tmp_path: Path) -> None:
    write(tmp_path, SMALL)
    both = Both(tmp_path, "bfloat16", deterministic=True)
    backend, n = both.backends[0], both.length
    both.backends = (backend, backend)

    def last(rows: Rows) -> Any:
        both.off(rows)
        return backend.logits[0].clone()

    for i in range(4):
        alone = last([(4, 0, n(4) + 1)] if i == 0 else [(4, n(4) + i, 1)])
    resumed = last([(4, 0, n(4) + 4), *((i, 0, n(i) + 1) for i in range(5, 12))])
    assert torch.equal(alone, resumed)


@pytest.mark.parametrize("family", ["t5", "flan-t5"])
def test_two_ranks_answer_as_one(family: str, tmp_path: Path) -> None:
    support_encoded.save(tmp_path, family)  # of three heads
    prompts = [[*prompt, support_encoded.START] for prompt in PROMPTS]
    two = Processes(2)
    try:
        (tokens, _), (others, _) = two.run("answers", str(tmp_path), prompts, 12)
    finally:
        two.close()
    assert tokens == others == answers(Group(), str(tmp_path), prompts, 12)[0]


@pytest.mark.parametrize("family", ["t5", "flan-t5", "mt5", "umt5"])
def test_greedy_text_in_float32_is_that_of_transformers(family: str, tmp_path: Path) -> None:
    model = support_encoded.save(tmp_path, family)
    found = text_of(tmp_path, "auto", [[*prompt, support_encoded.START] for prompt in PROMPTS], dtype="float32")
    for prompt, ids in zip(PROMPTS, found, strict=True):
        given = torch.tensor([prompt])
        made = model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=12,
                              eos_token_id=None)  # fmt: skip
        assert ids == made[0, 1:].tolist()
