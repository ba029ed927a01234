"""Small tokenizers, and recorded results of other programs for the same vocabularies."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

DATA = Path(__file__).parent / "data" / "text"


def recorded(name: str) -> Any:
    """Return recorded results of another program: llamacpp.json, sentencepiece.json or tiktoken.json."""
    return json.loads((DATA / name).read_text())


def byte_level() -> tokenizers.Tokenizer:
    """Return a byte-level BPE tokenizer of 600 tokens, of which the first three are special."""
    data = recorded("llamacpp.json")
    vocabulary = {token: i for i, token in enumerate(data["tokens"])}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in data["merges"]]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True) for token in data["tokens"][:3]])
    return inner


def sentencepiece_model(name: str) -> bytes:
    """Return the content of a tokenizer.model."""
    return zlib.decompress(base64.b64decode(recorded("sentencepiece.json")["models"][name]["file"]))


def write_gguf(
    path: Path, *, pre: str = "gpt-2", template: str | None = None, merges: list[str] | None = None, **metadata: Any
) -> Path:
    """Write a GGUF file with a vocabulary and almost nothing else."""
    data = recorded("llamacpp.json")
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(data["tokens"])
    writer.add_token_types([3] * 3 + [1] * (len(data["tokens"]) - 3))
    writer.add_token_merges(data["merges"] if merges is None else merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if template is not None:
        writer.add_chat_template(template)
    for key, value in metadata.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    return _write(writer, path)


def write_sentencepiece_gguf(
    path: Path, pieces: list[str], scores: list[float], kinds: list[int], merges: list[str] | None = None
) -> Path:
    """Write a GGUF file with a vocabulary of the "llama" kind, or of "gemma4"'s if there are merges."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model("gemma4" if merges else "llama")
    if merges:
        writer.add_token_merges(merges)
        writer.add_add_space_prefix(False)
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    return _write(writer, path)


def _write(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.add_tensor("token_embd.weight", np.zeros((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
