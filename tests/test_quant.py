"""Matrices as stored, shards of them for each rank, and invalid safetensors headers."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tokenmill.errors import ModelError, Unsupported
from tokenmill.program.ops import Part, Weight
from tokenmill.quant.base import Coded, check, dense, load, pieces_of, reader_of, stack
from tokenmill.weights.checkpoint import Safetensors, open_checkpoint
from tokenmill.weights.source import local_source


def folder_of(tmp_path: Path, tensors: dict[str, np.ndarray], **config: Any) -> Safetensors:
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = open_checkpoint(local_source(tmp_path))
    assert isinstance(source, Safetensors)
    return source


def test_heads_are_shared_out_whole_and_repeated_if_there_are_too_few(tmp_path: Path) -> None:
    q, k = (np.arange(n * 4, dtype=np.float32).reshape(n, 4) for n in (8, 4))
    source = folder_of(tmp_path, {"q": q, "k": k + 100})
    weight = Weight((Part("q", 8), Part("k", 4)), 4, "column", unit=2, heads=(4, 2), ranks=4)
    for rank in range(4):
        got = load(weight, source, reader_of(source), rank).floats()
        np.testing.assert_array_equal(got[:2], q[2 * rank : 2 * rank + 2])
        np.testing.assert_array_equal(got[2:], k[rank // 2 * 2 : rank // 2 * 2 + 2] + 100)


def test_a_bias_behind_a_row_parallel_product_is_rank_0s_alone(tmp_path: Path) -> None:
    source = folder_of(tmp_path, {"b": np.ones(6, np.float32)})
    weight = Weight((Part("b", 6),), shard="row", add=1.0, ranks=2)
    assert load(weight, source, reader_of(source), 0).floats().tolist() == [2.0] * 6
    assert load(weight, source, reader_of(source), 1).floats().tolist() == [0.0] * 6


def test_a_transposed_matrix_and_parts_of_a_fused_one_come_out_as_rows(tmp_path: Path) -> None:
    a = np.arange(24, dtype=np.float32).reshape(4, 6)
    source = folder_of(tmp_path, {"a": a})
    weight = Weight((Part("a", 2, 0), Part("a", 4, 2)), 4, transposed=True)
    check([weight], source)
    np.testing.assert_array_equal(load(weight, source, reader_of(source)).floats(), a.T)


def test_each_float_type_is_read_exactly(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    values = torch.randn(5, 7)
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
    save_torch({name: values.to(kind) for name, kind in kinds.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    source = open_checkpoint(local_source(tmp_path))
    for name, kind in kinds.items():
        got = load(Weight((Part(name, 5),), 7), source, reader_of(source)).floats()
        np.testing.assert_array_equal(got, values.to(kind).float().numpy())


def test_stacking_keeps_what_is_alike_and_makes_floats_of_what_is_not() -> None:
    rng = np.random.default_rng(0)

    def four() -> Coded:
        codes = rng.integers(0, 256, (2, 1, 16), dtype=np.uint8)
        scale, low = rng.normal(size=(2, 2, 1)).astype(np.float16)
        return Coded(codes, "u4", scale, (1, 32), low=low)

    a, b, c = four(), four(), dense(rng.normal(size=(3, 32)).astype(np.float32))
    both = stack([a, b])
    assert both.format == "u4"
    np.testing.assert_array_equal(both.floats(), np.concatenate([a.floats(), b.floats()]))
    mixed = stack([a, c])
    assert mixed.dense
    np.testing.assert_array_equal(mixed.floats(), np.concatenate([a.floats(), c.floats()]))


def test_four_bit_codes_mean_what_the_docstring_says() -> None:
    codes = np.arange(16, dtype=np.uint8)[None, None]  # low nibble k, high nibble 0
    scale, low = np.array([[[0.5]], [[3.0]]], np.float16)
    blocks = Coded(codes, "u4", scale, (1, 32), low=low)
    assert blocks.floats()[0].tolist() == [k * 0.5 + 3 for k in range(16)] + [3.0] * 16


def test_a_method_without_a_file_is_refused_by_name(tmp_path: Path) -> None:
    source = folder_of(tmp_path, {"a": np.ones(2, np.float32)}, quantization_config={"quant_method": "quip"})
    with pytest.raises(Unsupported, match="quantization 'quip' is not supported"):
        reader_of(source)
    plain = folder_of(tmp_path, {"a": np.ones(2, np.float32)})
    with pytest.raises(Unsupported, match="quantization 'quick' is not supported"):
        reader_of(plain, "quick")


def test_weights_of_integers_are_refused_by_name(tmp_path: Path) -> None:
    source = folder_of(tmp_path, {"a": np.ones((2, 2), np.int32)})
    with pytest.raises(Unsupported, match=r"I32.*'a'"):
        load(Weight((Part("a", 2),), 2), source, reader_of(source))


def file_of(header: Any, data: int = 64) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(data)


def entry(shape: Any, start: Any, stop: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


HOSTILE = {
    "empty": b"",
    "short": b"\0\0\0",
    "header of 2^63 bytes": struct.pack("<Q", 1 << 63) + bytes(64),
    "header beyond the end": struct.pack("<Q", 100) + bytes(64),
    "no json": file_of(b"{nonsense"),
    "a list": file_of([1, 2]),
    "deep nesting": file_of(b'{"a":' + b"[" * 100_000),
    "entry of another kind": file_of({"t": 3}),
    "no offsets": file_of({"t": {"dtype": "F32", "shape": [1]}}),
    "unknown dtype": file_of({"t": entry([4], 0, 16, "F31")}),
    "dtype no string": file_of({"t": entry([4], 0, 16, ["F32"])}),
    "negative shape": file_of({"t": entry([-4, -1], 0, 16)}),
    "shape of floats": file_of({"t": entry([4.0], 0, 16)}),
    "shape of bools": file_of({"t": entry([True], 0, 4)}),
    "negative offset": file_of({"t": entry([4], -16, 0)}),
    "backwards": file_of({"t": entry([4], 16, 0)}),
    "beyond the end": file_of({"t": entry([32], 0, 128)}),
    "size and shape differ": file_of({"t": entry([3], 0, 16)}),
    "overflowing shape": file_of({"t": entry([1 << 40, 1 << 40], 0, 16)}),
    "overlapping": file_of({"a": entry([4], 0, 16), "b": entry([4], 12, 28)}),
    "too many dimensions": file_of({"t": entry([1] * 9, 0, 4)}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_safetensors_header_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(HOSTILE[name])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        open_checkpoint(local_source(tmp_path))


@pytest.mark.parametrize("listed", ["../elsewhere.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_an_index_that_leaves_the_folder_is_refused(tmp_path: Path, listed: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "elsewhere.safetensors")
    save_file({"a": np.ones(2, np.float32)}, folder / "model-1.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": listed}}))
    with pytest.raises(ModelError, match="outside the model's folder"):
        open_checkpoint(local_source(folder))


def test_a_missing_shard_that_the_index_names_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a": np.ones(2, np.float32)})
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"b": "model-2.safetensors"}}))
    with pytest.raises(ModelError, match=r"model-2\.safetensors"):
        open_checkpoint(local_source(tmp_path))


@pytest.mark.parametrize(
    "names, words",
    [
        ((), "no weights to serve"),
        (("model.safetensors",), "no config.json"),
        (("pytorch_model.bin", "config.json"), "pickled"),
        (("a.gguf", "b.gguf"), r"2 GGUF models\. Choose one .*: a\.gguf, b\.gguf"),
    ],
)
def test_a_folder_with_nothing_to_serve_is_refused_with_the_cure(tmp_path: Path, names: Any, words: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ModelError, match=words):
        local_source(tmp_path)


def test_a_path_that_is_no_model_is_refused_with_the_cure(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="Give its folder"):
        local_source(tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="does not exist"):
        local_source(tmp_path / "nowhere")


def test_a_file_with_flipped_bytes_is_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a": np.ones((4, 4), np.float32), "b": np.ones(3, np.float16)})
    path, rng = tmp_path / "model.safetensors", np.random.default_rng(0)
    whole, read = path.read_bytes(), 0
    for _ in range(400):
        flipped = bytearray(whole)
        flipped[rng.integers(0, len(whole))] = rng.integers(0, 256)
        path.write_bytes(bytes(flipped))
        try:
            source = Safetensors(tmp_path)
            read += all(source[name].data.nbytes == source.nbytes(name) for name in source.names())
        except ModelError:
            continue
    assert 0 < read < 400


def test_a_stack_of_matrices_is_read_one_by_one(tmp_path: Path) -> None:
    """As some checkpoints store a layer's experts: gate and up in one tensor, matrices transposed or not."""
    stack3, flipped = np.random.default_rng(0).normal(size=(2, 3, 8, 4)).astype(np.float32)
    source = folder_of(tmp_path, {"s": stack3, "t": flipped.transpose(0, 2, 1).copy(), "b": stack3[:, 0].copy()})
    halves = [[Part("s", 4, start, index=index) for start in (0, 4)] for index in range(3)]
    gate_up = [Weight(tuple(parts), 4, "column") for parts in halves]
    down = [Weight((Part("t", 8, index=index),), 4, transposed=True) for index in range(3)]
    rows = [Weight((Part("b", 4, index=index),)) for index in range(3)]
    check([*gate_up, *down, *rows], source)
    for index in range(3):
        for rank in (0, 1):
            want = np.concatenate([stack3[index, 2 * rank :][:2], stack3[index, 4 + 2 * rank :][:2]])
            got = load(replace(gate_up[index], ranks=2), source, reader_of(source), rank)
            np.testing.assert_array_equal(got.floats(), want)
        np.testing.assert_array_equal(load(down[index], source, reader_of(source)).floats(), flipped[index])
        np.testing.assert_array_equal(load(rows[index], source, reader_of(source)).floats(), stack3[index, 0])


def test_a_stack_of_another_height_is_refused(tmp_path: Path) -> None:
    source = folder_of(tmp_path, {"s": np.zeros((3, 8, 4), np.float32)})
    with pytest.raises(ModelError, match=r"'s' has shape \(3, 8, 4\); config.json says \(2, 8, 4\)"):
        check([Weight((Part("s", 8, index=i),), 4) for i in range(2)], source)


def test_rows_of_a_part_in_runs_of_one_are_one_piece(tmp_path: Path) -> None:
    """As some checkpoints alternate the rows of gate and up: thousands of pieces would take minutes to read."""
    a = np.arange(64, dtype=np.float32).reshape(16, 4)
    source = folder_of(tmp_path, {"a": a, "b": a[:, 0].copy()})
    halves = tuple(Part("a", 8, start, run=1, step=2) for start in (0, 1))
    weight = Weight(halves, 4, "column", ranks=2)
    vector = Weight((Part("b", 8, 1, run=1, step=2),), 0, "column", ranks=2)
    check([replace(weight, ranks=1), replace(vector, ranks=1)], source)
    for rank in (0, 1):
        assert len(pieces_of(weight, rank)) == 2
        want = np.concatenate([a[8 * rank + start : 8 * rank + 8 : 2] for start in (0, 1)])
        np.testing.assert_array_equal(load(weight, source, reader_of(source), rank).floats(), want)
        got = load(vector, source, reader_of(source), rank)
        np.testing.assert_array_equal(got.floats(), a[8 * rank + 1 : 8 * rank + 8 : 2, 0])
    coded = Coded(np.arange(24, dtype=np.int8).reshape(8, 3), "i8", np.arange(8.0)[:, None], (1, 0))
    np.testing.assert_array_equal(coded.take(slice(1, 8, 2), slice(None)).floats(), coded.floats()[1::2])


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16"])
def test_stacked_matrices_become_a_tensor_rounded_as_by_torch(
    stored: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    from tokenmill.backends.torch import pack

    monkeypatch.setattr(pack, "_CHUNK", 40)  # several chunks of rows
    parts = [torch.randn(rows, 16, dtype=torch.float64).to(getattr(torch, stored)) for rows in (5, 1, 7)]
    arrays = [a.view(torch.int16).numpy().view(np.uint16) if stored == "bfloat16" else a.numpy() for a in parts]
    for a in arrays:
        a.flags.writeable = False  # as views of a file
    got = pack.stacked([dense(a) for a in arrays], getattr(torch, wanted))
    assert torch.equal(got, torch.cat(parts).float().to(getattr(torch, wanted)))
    assert torch.equal(pack.to_tensor(dense(arrays[0][0]), torch.float32), parts[0][0].float())
