"""GGUF files of an encoder and a decoder: the same text as transformers', with the file's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from safetensors.numpy import load_file
from support_encoded import SIZES, START, save
from support_gguf import ARCH
from test_encoded import engine_of, greedy
from test_gguf import finish

from tokenmill.errors import ModelError, StartError, Unsupported
from tokenmill.text import gguf_vocabulary
from tokenmill.weights.checkpoint import model_config
from tokenmill.weights.source import local_source
from tokenmill.wire.messages import StoppingParams

torch.set_num_threads(1)
WORDS = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{a}{b}" for a in "abcdefghij" for b in "klmnopqrstuv")]
KINDS = [3, 3, 2, *[1] * (len(WORDS) - 3)]
SCORES = [0.0, 0.0, 0.0, -5.0, *[-2.0] * (len(WORDS) - 4)]


def write(path: Path, tensors: dict[str, np.ndarray], architecture: str = "t5", **changes: Any) -> Path:
    """Write a file as llama.cpp's converter does. `changes`: keys; None leaves one out."""
    writer = gguf.GGUFWriter(path, architecture)
    keys = {
        "context_length": 512, "embedding_length": SIZES["d_model"], "feed_forward_length": SIZES["d_ff"],
        "block_count": 2, "attention.head_count": SIZES["num_heads"], "attention.key_length": SIZES["d_kv"],
        "attention.value_length": SIZES["d_kv"], "attention.layer_norm_epsilon": 1e-6,
        "attention.layer_norm_rms_epsilon": 1e-6, "attention.relative_buckets_count": 32,
        "decoder_start_token_id": START,
    } | changes  # fmt: skip
    for key, value in keys.items():
        if isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_tokenizer_model("t5")
    writer.add_token_list(WORDS)
    writer.add_token_scores(SCORES)
    writer.add_token_types(KINDS)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(2)
    finish(writer, {name: (array, None) for name, array in tensors.items()})
    return path


def converted(folder: Path) -> dict[str, np.ndarray]:
    names = gguf.get_tensor_name_map(ARCH["t5"], 3)
    found = load_file(folder / "model.safetensors")
    return {str(names.get_name(name, (".weight",))): array for name, array in found.items()}


@pytest.mark.parametrize(
    "family", [pytest.param("t5", marks=pytest.mark.slow), "flan-t5", pytest.param("umt5", marks=pytest.mark.slow)]
)
def test_a_model_of_each_kind_gets_transformers_greedy_text(family: str, tmp_path: Path) -> None:
    buckets = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}
    model = save(tmp_path, family, **buckets)
    layers = {"decoder_block_count": 3} if family == "flan-t5" else {}
    prompts = [[5, 9, 77, 12, 1], [3] * 40, [8]]
    with engine_of(write(tmp_path / "m.gguf", converted(tmp_path), **layers)) as engine:
        found = engine.generate([[*prompt, START] for prompt in prompts], None, StoppingParams(8))
    assert found == [greedy(model, prompt, 8) for prompt in prompts]


def test_the_files_tokenizer_is_a_unigram_model_that_ends_inputs_and_begins_answers(tmp_path: Path) -> None:
    own = gguf_vocabulary.load(write(tmp_path / "m.gguf", {"token_embd.weight": np.zeros((128, 32), np.float32)}))
    theirs = tokenizers.Tokenizer(tokenizers.models.Unigram(list(zip(WORDS, SCORES, strict=True)), unk_id=2))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    for text in ("ak bl cm", "ak", "akbl zz"):
        assert own.encode(text) == [*theirs.encode(text).ids, 1]
    assert own.answer_start == (START,)
    assert own.decode(own.encode("ak bl")[:-1]) == "ak bl"


def test_files_without_an_answers_first_token_or_a_decoder_are_refused(tmp_path: Path) -> None:
    embedding = {"token_embd.weight": np.zeros((128, 32), np.float32)}
    path = write(tmp_path / "a.gguf", embedding, decoder_start_token_id=None)
    with pytest.raises(ModelError, match=r"lacks the key 't5\.decoder_start_token_id'"):
        gguf_vocabulary.load(path)
    path = write(tmp_path / "b.gguf", embedding, "t5encoder")
    with pytest.raises(Unsupported, match="'t5encoder' is not supported"):
        model_config(local_source(path))
    path = write(tmp_path / "c.gguf", embedding)
    with pytest.raises(StartError, match=r"no tensor '\w+\.block\.0"):
        engine_of(path)
