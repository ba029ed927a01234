"""Checkpoints of quantized weights, written and dequantized by the definitions of the formats, with torch alone.

A writer takes the weight of a module, (rows, columns) in float32, and returns its tensors by their names behind the
module's, and the numbers that they stand for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Written = tuple[dict[str, Tensor], Tensor]
Writer = Callable[[Tensor], Written]

FP4 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
BNB_FP4 = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3]) / 12


def spread(numbers: Tensor, height: int, width: int, shape: torch.Size) -> Tensor:
    """Return numbers of blocks as one for each element."""
    return numbers.repeat_interleave(height, 0).repeat_interleave(width, 1)[: shape[0], : shape[1]]


def largest(w: Tensor, height: int, width: int) -> Tensor:
    """Return the largest magnitude of each block, (blocks of rows, blocks of columns)."""
    rows, columns = w.shape
    padded = torch.nn.functional.pad(w, (0, -columns % width, 0, -rows % height))
    blocks = padded.reshape(padded.shape[0] // height, height, padded.shape[1] // width, width)
    return blocks.abs().amax((1, 3)).clamp(min=1e-6)


def fp8(
    block: tuple[int, int],
    name: str = "weight_scale_inv",
    kind: torch.dtype = torch.float8_e4m3fn,
    shape: tuple[int, ...] | None = None,
    **more: Tensor,
) -> Writer:
    """FP8 with scales of blocks; 0: of the whole. `shape`: of the tensor of scales; `more`: other tensors."""

    def write(w: Tensor) -> Written:
        height, width = (size or whole for size, whole in zip(block, w.shape, strict=True))
        scale = largest(w, height, width) / torch.finfo(kind).max
        codes = (w / spread(scale, height, width, w.shape)).to(kind)
        numbers = codes.float() * spread(scale, height, width, w.shape)
        return {"weight": codes, name: scale if shape is None else scale.reshape(shape), **more}, numbers

    return write


def mxfp8(name: str) -> Writer:
    """FP8 with powers of two as scales of 32 columns."""

    def write(w: Tensor) -> Written:
        exponent = (largest(w, 1, 32) / 448).log2().ceil()
        scale = spread(exponent.exp2(), 1, 32, w.shape)
        codes = (w / scale).to(torch.float8_e4m3fn)
        return {"weight": codes, name: (exponent + 127).byte()}, codes.float() * scale

    return write


def int8(
    name: str = "weight_scale", factor: float = 1.0, width: int = 0, *, zeros: bool = False, **more: Any
) -> Writer:
    """Int8 codes with scales of rows or of `width` columns, and zero points if wanted."""

    def write(w: Tensor) -> Written:
        each = width or w.shape[1]
        scale = largest(w, 1, each) / 100
        zero = torch.randint(-20, 20, scale.shape, dtype=torch.int8) if zeros else torch.zeros_like(scale).char()
        by_element, zero_of = (spread(n.float(), 1, each, w.shape) for n in (scale, zero))
        codes = (w / by_element + zero_of).round().clamp(-128, 127).char()
        stored = scale * factor if name != "SCB" else scale[:, 0] * factor
        tensors = {"weight": codes, name: stored} | ({"weight_zero_point": zero} if zeros else {}) | more
        return tensors, (codes.float() - zero_of) * by_element

    return write


def words(codes: Tensor, bits: int, *, stream: bool = False) -> Tensor:
    """Pack unsigned integers (rows, n) to int32 (rows, words), whole ones a word or as one stream of bits."""
    rows, n = codes.shape
    if stream:
        bit = ((codes[..., None].long() >> torch.arange(bits)) & 1).reshape(rows, -1)
        bit = torch.nn.functional.pad(bit, (0, -bit.shape[1] % 32)).reshape(rows, -1, 32)
        made = (bit << torch.arange(32)).sum(-1)
    else:
        whole = 32 // bits
        padded = torch.nn.functional.pad(codes.long(), (0, -n % whole)).reshape(rows, -1, whole)
        made = (padded << (torch.arange(whole) * bits)).sum(-1)
    return torch.where(made >= 1 << 31, made - (1 << 32), made).int()


def packed(
    bits: int, width: int = 0, *, zeros: str = "", order: bool = False, stream: bool = False, dtype: Any = torch.float32
) -> Writer:
    """compressed-tensors' packed integers. `zeros`: "", "packed" or "plain"; `order`: columns in a random order."""

    def write(w: Tensor) -> Written:
        half, (rows, columns) = 1 << bits - 1, w.shape
        each = width or columns
        group = torch.arange(columns) // each
        if order:
            group = group[torch.randperm(columns)]
        by_group = torch.argsort(group, stable=True)
        scale = (largest(w[:, by_group], 1, each) / (half - 0.5)).to(dtype)
        zero = torch.randint(-1, 2, scale.shape).int() if zeros else torch.zeros(scale.shape).int()
        codes = (w / scale.float()[:, group] + zero[:, group]).round().clamp(-half, half - 1).int()
        tensors = {"weight_packed": words(codes + half, bits, stream=stream), "weight_scale": scale}
        tensors["weight_shape"] = torch.tensor([rows, columns])
        if zeros == "packed":
            tensors["weight_zero_point"] = words((zero + half).T.contiguous(), bits, stream=stream).T.contiguous()
        elif zeros:
            tensors["weight_zero_point"] = zero.char()
        if order:
            tensors["weight_g_idx"] = group.int()
        return tensors, (codes - zero[:, group]).float() * scale.float()[:, group]

    return write


def nearest(x: Tensor, table: Tensor) -> Tensor:
    """Return the index of the nearest number of a table for each element."""
    return (x[..., None] - table).abs().argmin(-1)


def pairs(codes: Tensor, *, high_first: bool = False) -> Tensor:
    """Pack codes of four bits of adjacent columns, (rows, n) to bytes (rows, n / 2)."""
    first, second = codes[:, ::2].byte(), codes[:, 1::2].byte()
    return first << 4 | second if high_first else first | second << 4


def mx(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return MXFP4's codes (rows, columns), biased exponents (rows, blocks), and numbers."""
    exponent = (largest(w, 1, 32) / 6).log2().ceil().clamp(-127, 127)
    scale = spread(exponent.exp2(), 1, 32, w.shape)
    codes = nearest(w / scale, FP4)
    return codes, (exponent + 127).byte(), FP4[codes] * scale


def mxfp4(w: Tensor) -> Written:
    """compressed-tensors' MXFP4."""
    codes, exponent, numbers = mx(w)
    return {"weight_packed": pairs(codes), "weight_scale": exponent}, numbers


def nvfp4(codes_name: str, whole_name: str, *, divides: bool, **more: Tensor) -> Writer:
    """NVFP4. `divides`: its scale of the tensor divides those of 16 columns."""

    def write(w: Tensor) -> Written:
        whole = largest(w, *w.shape)[0] / 6 / 448
        local = (largest(w, 1, 16) / 6 / whole).to(torch.float8_e4m3fn)
        scale = spread(local.float() * whole, 1, 16, w.shape)
        codes = nearest(w / scale.clamp(min=1e-12), FP4)
        tensors = {codes_name: pairs(codes), "weight_scale": local, whole_name: 1 / whole if divides else whole}
        return tensors | more, FP4[codes] * scale

    return write


def four_bits(kind: str, block: int = 64, *, nested: bool = False, storage: torch.dtype = torch.uint8) -> Writer:
    """bitsandbytes' NF4 and FP4. `storage`: type of the tensor that holds the bytes of the codes."""

    def write(w: Tensor) -> Written:
        table, flat = {"nf4": NF4, "fp4": BNB_FP4}[kind], w.reshape(-1)
        blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).reshape(-1, block)
        absmax = blocks.abs().amax(-1).clamp(min=1e-6)
        state = {"quant_type": kind, "blocksize": block, "dtype": "float32", "shape": list(w.shape)}
        tensors = {"weight.quant_map": table, "weight.absmax": absmax}
        if nested:
            outer, table8 = 256, torch.linspace(-1, 1, 256)
            offset = absmax.mean()
            padded = torch.nn.functional.pad(absmax - offset, (0, -absmax.numel() % outer)).reshape(-1, outer)
            outer_max = padded.abs().amax(-1).clamp(min=1e-6)
            inner = nearest(padded / outer_max[:, None], table8)
            absmax = (table8[inner] * outer_max[:, None]).reshape(-1)[: absmax.numel()] + offset
            tensors["weight.absmax"] = inner.reshape(-1)[: absmax.numel()].byte()
            tensors |= {"weight.nested_absmax": outer_max, "weight.nested_quant_map": table8}
            state |= {"nested_blocksize": outer, "nested_dtype": "float32", "nested_offset": float(offset)}
        codes = nearest(blocks / absmax[:, None], table)
        numbers = (table[codes] * absmax[:, None]).reshape(-1)[: flat.numel()].reshape(w.shape)
        tensors["weight"] = pairs(codes.reshape(1, -1)[:, : flat.numel()], high_first=True).view(storage).reshape(-1, 1)
        text = json.dumps(state).encode()
        tensors[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
        return tensors, numbers

    return write


def quantize_gpt_oss(folder: Path) -> dict[str, Tensor]:
    """Store the experts of a gpt-oss checkpoint in MXFP4, in place. Returns all numbers."""
    path = folder / "model.safetensors"
    made, numbers = dict[str, Tensor](), dict[str, Tensor]()
    for name, w in load_file(path).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            made[name] = numbers[name] = w
            continue
        parts = [mx(each.T.contiguous().float()) for each in w]  # stored (inputs, outputs)
        made[f"{name}_blocks"] = torch.stack([pairs(codes).reshape(len(codes), -1, 16) for codes, _, _ in parts])
        made[f"{name}_scales"] = torch.stack([exponent for _, exponent, _ in parts])
        numbers[name] = torch.stack([floats.T for _, _, floats in parts])
    save_file(made, path)
    config = json.loads((folder / "config.json").read_text())
    about = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    return numbers


def quantize_folder(
    folder: Path, about: dict[str, Any], writer_of: Callable[[str], Writer | None]
) -> dict[str, Tensor]:
    """Quantize the matrices of a checkpoint in place, and describe it in config.json.

    `writer_of`: returns the writer of a module by its name; None: it stays plain. Returns all numbers by the names that
    the checkpoint had.
    """
    path = folder / "model.safetensors"
    tensors, made, numbers = load_file(path), dict[str, Tensor](), dict[str, Tensor]()
    for name, w in tensors.items():
        module = name.removesuffix(".weight")
        write = writer_of(module) if module != name and w.dim() == 2 else None
        if write is None:
            made[name] = numbers[name] = w
            continue
        parts, numbers[name] = write(w.float())
        made |= {f"{module}.{suffix}": part.contiguous().clone() for suffix, part in parts.items()}
    save_file(made, path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    return numbers


def plain_folder(folder: Path, numbers: dict[str, Any]) -> Path:
    """Write a checkpoint of the numbers beside a quantized one."""
    plain = folder / "plain"
    plain.mkdir()
    save_file(numbers, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    return plain
