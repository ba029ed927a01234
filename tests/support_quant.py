"""Quantized matrices as checkpoints store them, written from the definitions of the formats, one code at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]


class Quantized(NamedTuple):
    """A matrix (outputs, inputs) as codes: the number is scale[group] · (code − zero[group])."""

    codes: np.ndarray  # (outputs, inputs)
    scale: np.ndarray  # (outputs, groups), float16
    zero: np.ndarray  # (outputs, groups)
    index: np.ndarray  # (inputs,): group of an input
    bits: int

    def numbers(self) -> np.ndarray:
        """The matrix in float32."""
        scale, zero = self.scale.astype(np.float32)[:, self.index], self.zero[:, self.index]
        return np.asarray(scale * (self.codes - zero).astype(np.float32))


def quantized(
    w: np.ndarray, bits: int = 4, group: int = 32, *, sym: bool = False, index: np.ndarray | None = None
) -> Quantized:
    """Round a matrix to the nearest codes."""
    outputs, inputs = w.shape
    index = np.arange(inputs) // (group if group > 0 else inputs) if index is None else index
    groups, last = int(index.max()) + 1, (1 << bits) - 1
    scale, zero = np.ones((outputs, groups), np.float16), np.zeros((outputs, groups), np.int64)
    for g in range(groups):
        some = w[:, index == g]
        low, high = np.minimum(some.min(1), 0), np.maximum(some.max(1), 0)
        if sym:
            high = np.maximum(np.abs(low), high)
            low = -high
        scale[:, g] = np.maximum((high - low) / last, 1e-4).astype(np.float16)
        zero[:, g] = last // 2 + 1 if sym else np.clip(np.rint(-low / scale[:, g].astype(np.float32)), 0, last)
    spread = scale.astype(np.float32)[:, index]
    codes = np.clip(np.rint(w / spread) + zero[:, index], 0, last).astype(np.int64)
    return Quantized(codes, scale, zero, index, bits)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes along the last axis into int32: a stream of bits, the lowest first."""
    rows = codes.reshape(-1, codes.shape[-1])
    out = np.zeros((len(rows), -(-codes.shape[-1] * bits // 32)), np.int64)
    for row, values in enumerate(rows.tolist()):
        stream = sum((int(code) & (1 << bits) - 1) << bits * i for i, code in enumerate(values))
        out[row] = [stream >> 32 * i & 0xFFFFFFFF for i in range(out.shape[1])]
    return out.astype(np.uint32).view(np.int32).reshape(*codes.shape[:-1], -1)


def gptq(module: str, q: Quantized, *, v2: bool = False, index: bool = True) -> Arrays:
    """Tensors of a matrix as AutoGPTQ (or, in `v2`, GPTQModel) writes them."""
    stored = {
        "qweight": packed(q.codes, q.bits).T, "scales": q.scale.T,
        "qzeros": packed((q.zero - (0 if v2 else 1)).T, q.bits),
    }  # fmt: skip
    if index:
        stored["g_idx"] = q.index.astype(np.int32)
    return {f"{module}.{name}": np.ascontiguousarray(array) for name, array in stored.items()}


def awq(module: str, q: Quantized) -> Arrays:
    """Tensors of a matrix as AutoAWQ writes them in version gemm."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def along_outputs(codes: np.ndarray) -> np.ndarray:
        return packed(codes.reshape(len(codes), -1, 8)[..., order].reshape(len(codes), -1), 4)

    stored = {"qweight": along_outputs(q.codes.T), "scales": q.scale.T, "qzeros": along_outputs(q.zero.T)}
    return {f"{module}.{name}": np.ascontiguousarray(array) for name, array in stored.items()}


def awq_gemv(module: str, q: Quantized, group: int) -> Arrays:
    """Tensors of a matrix as AutoAWQ writes them in version gemv."""
    words, multiple = -(-q.scale.shape[1] // 8), {64: 2, 32: 4}.get(group, 1)
    words = -(-words // multiple) * multiple
    scales, zeros = np.zeros((len(q.codes), 8 * words), np.float16), np.zeros((len(q.codes), 8 * words), np.int64)
    scales[:, : q.scale.shape[1]], zeros[:, : q.scale.shape[1]] = q.scale, q.zero
    return {f"{module}.qweight": packed(q.codes, 4), f"{module}.scales": scales, f"{module}.qzeros": packed(zeros, 4)}


def marlin(module: str, q: Quantized, codes: str = "B", scales: str = "s") -> Arrays:
    """Tensors of a symmetric matrix as Marlin's own `pack` writes them."""
    outputs, inputs = q.codes.shape
    order = []
    for thread in range(32):
        four = [16 * (2 * (thread % 4) + row) + thread // 4 + 8 * block for block in (0, 1) for row in (0, 1, 8, 9)]
        order += [place + 256 * tile for tile in range(4) for place in four]
    order = np.array(order).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)
    tiles = q.codes.T.reshape(inputs // 16, 16, outputs // 16, 16).swapaxes(1, 2).reshape(-1, 1024)[:, order]
    if q.scale.shape[1] > 1:
        of_scales = [i + 8 * j for i in range(8) for j in range(8)]
    else:
        of_scales = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    s = q.scale.T.reshape(-1, len(of_scales))[:, of_scales].reshape(-1, outputs)
    stored: dict[str, Any] = {codes: packed(tiles.reshape(inputs // 16, -1), 4), scales: s}
    return {f"{module}.{name}": np.ascontiguousarray(array) for name, array in stored.items()}


LAYER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
         "mlp.down_proj")  # fmt: skip


def rewrite(folder: Any, write: Any, config: dict[str, Any], keep: Any = ()) -> dict[str, np.ndarray]:
    """Replace the products' matrices of a float checkpoint by quantized tensors, and its configuration.

    `write(module, matrix) -> (tensors, numbers)`, or None to keep a matrix. Returns the numbers by tensor name.
    """
    import json

    from safetensors.numpy import load_file, save_file

    tensors, numbers = load_file(folder / "model.safetensors"), {}
    for name in list(tensors):
        module = name.removesuffix(".weight")
        if tensors[name].ndim == 2 and "embed" not in name and module not in keep:
            made = write(module, tensors[name])
            if made is not None:
                stored, numbers[name] = made
                del tensors[name]
                tensors |= stored
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"quantization_config": config}))
    return numbers
