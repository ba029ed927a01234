"""GGUF: tensors of every type equal the `gguf` package's, models equal transformers', hostile headers are refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from support_gguf import interleaved
from support_models import SIZES, Driver, make_checkpoint, reference, steps

from tokenmill import fetch
from tokenmill.config import Settings
from tokenmill.errors import ModelError, Unsupported
from tokenmill.program.ops import Part, Weight
from tokenmill.program.rope import RopeTable
from tokenmill.quant.base import load, reader_of
from tokenmill.server.digests import model_digest
from tokenmill.weights.checkpoint import model_config, open_checkpoint
from tokenmill.weights.gguf import Gguf
from tokenmill.weights.source import local_source

torch.set_num_threads(1)
TYPES = [
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ4_NL", "IQ4_XS", "MXFP4", "TQ1_0", "TQ2_0", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S",
]  # fmt: skip


def random_blocks(kind: gguf.GGMLQuantizationType, rows: int, columns: int) -> np.ndarray:
    """Return random bytes with valid scales: every code, scale and minimum of the format appears."""
    rng = np.random.default_rng(0)
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (rows, columns // elements, size), dtype=np.uint8)
    halves = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2),
              "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": (), "IQ1_M": ()}  # fmt: skip
    if kind.name == "MXFP4":
        raw[..., 0] = rng.integers(0, 252, raw.shape[:2])  # exponents of numbers that float32 holds
    if kind.name == "IQ1_M":  # whose factor is in the top nibbles of four words: 1.0 and more
        raw[..., 49::2] = raw[..., 49::2] & 15 | (rng.integers(0, 16, raw[..., 49::2].shape) << 4).astype(np.uint8)
        raw[..., 55] = raw[..., 55] & 15 | 0x30
    for at in halves.get(kind.name, (0,)):
        scale = rng.normal(size=raw.shape[:2]).astype(np.float16)
        raw[..., at : at + 2] = scale[..., None].view(np.uint8)
    return raw.reshape(rows, -1)


def stored(kind: gguf.GGMLQuantizationType, values: np.ndarray) -> np.ndarray:
    if kind.name in ("F32", "F16", "BF16"):
        return gguf.quants.quantize(values, kind)
    return random_blocks(kind, *values.shape)


def metadata(writer: gguf.GGUFWriter, architecture: str = "llama", heads: int = 4, kv: int = 2, **rope: Any) -> None:
    writer.add_block_count(3)
    writer.add_context_length(256)
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    writer.add_uint32("tokenizer.ggml.eot_token_id", 5)
    writer.add_uint32("tokenizer.ggml.bos_token_id", 1)
    writer.add_token_list(["<unk>", "a", "é", "\n"])
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_array("tokenizer.ggml.token_type", [3, 1, 1, 1])


def finish(writer: gguf.GGUFWriter, tensors: dict[str, tuple[np.ndarray, Any]]) -> None:
    """Write the file of a writer that has its metadata."""
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(
    path: Path, architecture: str, tensors: dict[str, tuple[np.ndarray, Any]], extra: Any = None, **how: Any
) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    metadata(writer, architecture, **how)
    if extra:
        extra(writer)
    finish(writer, tensors)


@pytest.mark.parametrize("name", TYPES)
def test_every_type_equals_the_gguf_packages_dequantization(tmp_path: Path, name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    values = np.random.default_rng(1).normal(size=(24, 512)).astype(np.float32)
    raw = stored(kind, values)
    write(tmp_path / "m.gguf", "llama", {"token_embd.weight": (raw, kind)})
    source = open_checkpoint(local_source(tmp_path))
    want = gguf.quants.dequantize(raw, kind)
    read = reader_of(source)

    def got(**how: Any) -> np.ndarray:
        return load(Weight((Part("model.embed_tokens.weight", 24),), 512, **how), source, read, rank=1).floats()

    np.testing.assert_array_equal(got(), want)
    np.testing.assert_array_equal(got(shard="vocab", ranks=2), want[12:])
    np.testing.assert_array_equal(got(shard="row", ranks=4), want[:, 128:256])
    np.testing.assert_array_equal(got(shard="row", ranks=64, unit=8, heads=(64, 64)), want[:, 8:16])  # cuts blocks


def of_transformers(model: Any, heads: int, kv: int, permuted: bool) -> dict[str, tuple[np.ndarray, Any]]:
    """Return the model's tensors under GGUF's names, in the order of rows of llama.cpp's converter."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    qwen = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 3)
    made: dict[str, tuple[np.ndarray, Any]] = {}
    for name, p in model.state_dict().items():
        stem, suffix = name.rsplit(".", 1)
        array = p.numpy()
        if permuted and "q_proj" in name:
            array = interleaved(array, heads)
        if permuted and "k_proj" in name:
            array = interleaved(array, kv)
        theirs = names.get_name(stem) or qwen.get_name(stem)
        assert theirs
        made[f"{theirs}.{suffix}"] = np.ascontiguousarray(array), None
    return made


@pytest.mark.parametrize(
    "family, architecture", [("llama_tied_with_biases", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")]
)
def test_a_model_of_each_architecture_equals_transformers(tmp_path: Path, family: str, architecture: str) -> None:
    changes = {"num_attention_heads": 4, "mlp_bias": False}
    model = make_checkpoint(tmp_path / "hf", family, **changes)
    tensors = of_transformers(model, 4, 2, architecture == "llama")
    if model.config.tie_word_embeddings:
        del tensors["output.weight"]
    head_dim = model.config.to_dict().get("head_dim") or 16
    write(tmp_path / "m.gguf", architecture, tensors, lambda w: w.add_key_length(head_dim))
    backend = Driver.of(tmp_path / "m.gguf")
    for rows, want in zip(steps(), reference(model, steps()), strict=True):
        np.testing.assert_allclose(backend.feed(rows), want, rtol=1e-4, atol=1e-4)


def test_the_config_and_the_metadata_are_what_the_file_says(tmp_path: Path) -> None:
    embed = np.zeros((7, 64), np.float32)
    write(tmp_path / "m.gguf", "llama", {"token_embd.weight": (embed, None)})
    source = local_source(tmp_path, "mine")
    assert (source.model_id, source.format) == ("mine", "gguf")
    config = model_config(source)
    assert config["eos_token_id"] == [2, 5]
    assert (config["vocab_size"], config["tie_word_embeddings"], config["bos_token_id"]) == (7, True, 1)
    assert (config["head_dim"], config["num_key_value_heads"], config["rope_scaling"]) == (16, 2, None)
    file = Gguf(source.path)
    assert file.metadata["tokenizer.ggml.tokens"] == ["<unk>", "a", "é", "\n"]
    assert file.metadata["tokenizer.ggml.token_type"] == [3, 1, 1, 1]
    assert file.metadata["tokenizer.ggml.add_bos_token"] is False
    assert list(file.names()) == ["model.embed_tokens.weight"]


def test_rope_scaling_is_read_from_keys_and_from_the_tensor_of_factors(tmp_path: Path) -> None:
    embed = {"token_embd.weight": (np.zeros((7, 64), np.float32), None)}

    def yarn(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(64)

    write(tmp_path / "yarn.gguf", "qwen2", embed, yarn)
    config = model_config(local_source(tmp_path / "yarn.gguf"))
    assert config["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    factors = np.array([1, 1, 2, 4, 8, 8, 8, 8], np.float32)
    write(tmp_path / "llama3.gguf", "llama", {**embed, "rope_freqs.weight": (factors, None)})
    scaling = model_config(local_source(tmp_path / "llama3.gguf"))["rope_scaling"]
    plain, scaled = RopeTable.of(16, 1e4, 256, None), RopeTable.of(16, 1e4, 256, scaling)
    np.testing.assert_allclose(scaled.inverse_frequencies() * factors, plain.inverse_frequencies(), rtol=1e-6)


def test_what_cannot_be_served_is_refused_by_name(tmp_path: Path) -> None:
    embed = {"token_embd.weight": (np.zeros((7, 64), np.float32), None)}
    write(tmp_path / "a.gguf", "rwkv7", embed)
    with pytest.raises(Unsupported, match=r"'rwkv7' is not supported\. Supported: apertus, arcee,.*, qwen3,"):
        model_config(local_source(tmp_path / "a.gguf"))
    write(tmp_path / "b.gguf", "qwen2", embed, lambda w: w.add_expert_count(8))
    with pytest.raises(Unsupported, match="qwen2 with experts"):
        model_config(local_source(tmp_path / "b.gguf"))
    write(tmp_path / "d.gguf", "llama", {**embed, "rope_freqs.weight": (np.ones(8, np.float16), None)})
    with pytest.raises(ModelError, match=r"'rope_freqs.weight' is stored as F16"):
        model_config(local_source(tmp_path / "d.gguf"))
    raw = np.zeros((7, 292), np.uint8)
    write(tmp_path / "c.gguf", "llama", {"token_embd.weight": (raw, gguf.GGMLQuantizationType.Q8_K)})
    with pytest.raises(ModelError, match=r"stored as Q8_K\. Readable: F32.*, Q3_K,.*, TQ2_0, IQ1_S,"):
        Gguf(tmp_path / "c.gguf")["model.embed_tokens.weight"]
    with pytest.raises(ModelError, match=r"no tensor .output_norm.weight."):
        Gguf(tmp_path / "c.gguf")["model.norm.weight"]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(tensors: int, keys: int, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


HUGE = 1 << 62
HOSTILE = {
    "empty": b"",
    "four bytes": b"GGUF",
    "other magic": header(0, 0, magic=b"GGML") + bytes(64),
    "version 1": header(0, 0, version=1) + bytes(64),
    "big endian": header(0, 0, version=3 << 24) + bytes(64),
    "endless keys": header(0, HUGE) + bytes(64),
    "endless tensors": header(HUGE, 0) + bytes(64),
    "endless key": header(0, 1) + struct.pack("<Q", HUGE) + bytes(64),
    "negative length": header(0, 1) + struct.pack("<q", -1) + bytes(64),
    "unknown type": header(0, 1) + text("k") + struct.pack("<I", 99) + bytes(64),
    "endless string": header(0, 1) + text("k") + struct.pack("<IQ", 8, HUGE) + bytes(64),
    "endless list": header(0, 1) + text("k") + struct.pack("<IIQ", 9, 4, HUGE) + bytes(64),
    "endless list of strings": header(0, 1) + text("k") + struct.pack("<IIQ", 9, 8, HUGE) + bytes(64),
    "list of lists": header(0, 1) + text("k") + struct.pack("<IIQ", 9, 9, 3) + bytes(64),
    "a key twice": header(0, 2) + (text("k") + struct.pack("<II", 4, 1)) * 2 + bytes(64),
    "alignment 0": header(0, 1) + text("general.alignment") + struct.pack("<II", 4, 0) + bytes(64),
    "alignment 3": header(0, 1) + text("general.alignment") + struct.pack("<II", 4, 3) + bytes(64),
    "too many dimensions": header(1, 0) + tensor("t", (1,) * 5, 0, 0) + bytes(64),
    "beyond the end": header(1, 0) + tensor("t", (64, 64), 0, 0) + bytes(64),
    "offset beyond the end": header(1, 0) + tensor("t", (4,), 0, HUGE) + bytes(64),
    "overflowing size": header(1, 0) + tensor("t", (1 << 63, 2, 2), 0, 0) + bytes(64),
    "half a block": header(1, 0) + tensor("t", (33,), 8, 0) + bytes(64),
    "overlapping": header(2, 0) + tensor("a", (8,), 0, 0) + tensor("b", (8,), 0, 16) + bytes(256),
    "a split of words": header(0, 1) + text("split.count") + struct.pack("<I", 8) + text("three") + bytes(64),
    "the middle of a split": header(0, 1) + text("split.no") + struct.pack("<II", 4, 1) + bytes(64),
    "a tensor twice": header(2, 0) + tensor("a", (8,), 0, 0) + tensor("a", (8,), 0, 32) + bytes(256),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("strings", [True, False])
def test_a_hostile_header_is_refused(tmp_path: Path, name: str, strings: bool) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(ModelError, match=r"m\.gguf"):
        Gguf(path, strings=strings)


def test_every_cut_of_a_file_is_refused_and_no_flipped_byte_does_worse(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", "llama", {"token_embd.weight": (np.zeros((7, 64), np.float32), None)})
    whole = (tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for n in range(0, len(whole) - 32, 7):
        cut.write_bytes(whole[:n])
        with pytest.raises(ModelError):
            Gguf(cut)
    rng = np.random.default_rng(0)
    for _ in range(300):
        flipped = bytearray(whole)
        for _ in range(3):
            flipped[rng.integers(0, 900)] = rng.integers(0, 256)
        cut.write_bytes(bytes(flipped))
        try:
            source = Gguf(cut)
            assert source.config["model_type"]
            source["model.embed_tokens.weight"]
        except (ModelError, Unsupported):
            pass


def write_split(folder: Path, layers: int = 4, **how: Any) -> dict[str, np.ndarray]:
    """Write a model of one tensor per layer and one more, two per part, split as by the `gguf` package."""
    rng = np.random.default_rng(4)
    tensors = {"token_embd.weight": rng.normal(size=(7, 64)).astype(np.float32)}
    tensors |= {f"blk.{i}.attn_norm.weight": rng.normal(size=64).astype(np.float32) for i in range(layers)}
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=2, **how)
    metadata(writer)
    for key, array in tensors.items():
        writer.add_tensor(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.mark.parametrize("small_first", [False, True])
def test_a_split_file_is_read_by_its_folder_and_by_any_part(tmp_path: Path, small_first: bool) -> None:
    tensors = write_split(tmp_path, small_first_shard=small_first)
    parts = sorted(tmp_path.iterdir())
    assert parts[0].name == f"m-00001-of-0000{len(parts)}.gguf"
    for given in (tmp_path, *parts):
        source = local_source(given)
        assert source.path == str(parts[0])
        found = open_checkpoint(source)
        assert found.config["eos_token_id"] == [2, 5]
        np.testing.assert_array_equal(found["model.embed_tokens.weight"].data.view("<f4"), tensors["token_embd.weight"])
        for i in range(4):
            got = found[f"model.layers.{i}.input_layernorm.weight"].data.view("<f4").ravel()
            np.testing.assert_array_equal(got, tensors[f"blk.{i}.attn_norm.weight"])
    assert Gguf(parts[-1]).metadata["tokenizer.ggml.tokens"] == ["<unk>", "a", "é", "\n"]


def test_a_digest_of_a_split_file_is_of_all_its_parts(tmp_path: Path) -> None:
    write_split(tmp_path)
    source, last = local_source(tmp_path), max(tmp_path.iterdir())
    before = model_digest(source)
    content = bytearray(last.read_bytes())
    content[-3] ^= 1
    last.write_bytes(content)
    assert model_digest(source) != before


def test_parts_that_are_missing_exchanged_or_renamed_are_named(tmp_path: Path) -> None:
    write_split(tmp_path)
    first, second, third = sorted(tmp_path.iterdir())
    whole = second.read_bytes()
    second.unlink()
    for given in (tmp_path, first, third):
        with pytest.raises(ModelError, match=rf"missing.*: {second.name}\."):
            local_source(given)
    with pytest.raises(ModelError, match=rf"{second.name} is missing"):
        Gguf(first)
    second.write_bytes(third.read_bytes())
    with pytest.raises(ModelError, match=r"part 3 of 3 by its header, and part 2 of 3 by its name.*again"):
        Gguf(first)
    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=rf"{second.name} is no readable GGUF file.*download it again"):
        Gguf(first)
    second.write_bytes(whole)
    (tmp_path / "other").mkdir()
    write_split(tmp_path / "other", layers=5)
    last = third.read_bytes()
    third.write_bytes((tmp_path / "other" / third.name).read_bytes())
    with pytest.raises(ModelError, match="5 tensors in all are announced, its 3 parts have 6"):
        Gguf(first)
    third.write_bytes(last)
    blob = tmp_path / "0a1b2c"
    first.rename(blob)
    with pytest.raises(
        ModelError, match=r"one of 3 parts.*-00001-of-00003\.gguf, or join them: llama-gguf-split --merge"
    ):
        Gguf(local_source(blob).path)


def test_a_link_to_a_part_is_read_among_the_links_beside_it(tmp_path: Path) -> None:
    """In the Hub's cache, the files behind the links have other names."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    write_split(tmp_path / "blobs")
    for number, part in enumerate(sorted((tmp_path / "blobs").iterdir())):
        blob = part.rename(part.with_name(f"{number:064x}"))
        (tmp_path / "snapshot" / part.name).symlink_to(blob)
    assert len(list(open_checkpoint(local_source(tmp_path / "snapshot")).names())) == 5


@pytest.mark.parametrize("name", ["sha256-0a1b", "0a1b2c", "model.bin", "M.GGUF", "model.Q4_K_M"])
def test_a_file_is_known_by_its_first_bytes_whatever_its_name_is(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, "llama", {"token_embd.weight": (np.zeros((7, 64), np.float32), None)})
    (tmp_path / "README").write_text("GG")
    (tmp_path / "link").symlink_to(tmp_path / name)
    for given in (tmp_path / name, tmp_path / "link"):
        assert open_checkpoint(local_source(given)).format == "gguf"
    (tmp_path / "link").unlink()
    assert local_source(tmp_path).path == str(tmp_path / name)


def test_one_of_several_files_is_chosen_by_a_name_after_a_colon(tmp_path: Path) -> None:
    embed = {"token_embd.weight": (np.zeros((7, 64), np.float32), None)}
    (tmp_path / "deep").mkdir()
    for name in ("m-Q4_K_M.gguf", "m-Q8_0.gguf", "deep/m-BF16.gguf", "mmproj-m.gguf"):
        write(tmp_path / name, "llama", embed)
    with pytest.raises(ModelError, match=r"has 2 GGUF models.*m-Q4_K_M\.gguf, m-Q8_0\.gguf"):
        local_source(tmp_path)
    for wanted, name in (("q8_0", "m-Q8_0.gguf"), ("BF16", "deep/m-BF16.gguf"), ("m-Q4_K_M.gguf", "m-Q4_K_M.gguf")):
        found = fetch.on_disk(Settings(model_id=f"{tmp_path}:{wanted}"))
        assert found is not None
        assert (found.path, found.model_id) == (str(tmp_path / name), f"{tmp_path}:{wanted}")
    override = Settings(model_id="owner/name:Q8_0", weights_cache_override=str(tmp_path))
    assert fetch.on_disk(override).path == str(tmp_path / "m-Q8_0.gguf")


def test_a_file_that_holds_no_model_is_named(tmp_path: Path) -> None:
    def adapter(writer: gguf.GGUFWriter) -> None:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_string("general.base_model.0.repo_url", "https://huggingface.co/owner/base")

    nothing = {"a": (np.zeros((2, 32), np.float32), None)}
    write(tmp_path / "a.gguf", "llama", nothing, adapter)
    with pytest.raises(
        ModelError, match=r"no model but a LORA adapter to the model https://huggingface\.co/owner/base"
    ):
        Gguf(tmp_path / "a.gguf")
    write(tmp_path / "b.gguf", "clip", nothing)
    with pytest.raises(ModelError, match=r"projector of a model's images \(mmproj\)"):
        Gguf(tmp_path / "b.gguf")
    write(tmp_path / "c.gguf", "llama", nothing, lambda w: w.add_type("imatrix"))
    with pytest.raises(ModelError, match=r"calibration data \(imatrix\)"):
        Gguf(tmp_path / "c.gguf")
