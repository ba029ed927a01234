"""Tables of docs/quantization.md, from the methods' own readers and the backends' own choice of forms.

Run from the repository: PYTHONPATH=.:tests python tests/support_quant_table.py > docs/quantization.md
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import support_cuda  # noqa: F401  before any kernel, so that other tests run them under the interpreter
import support_quant
import torch
from support_quantized import Writer, four_bits, fp8, int8, mx, mxfp4, nvfp4, packed, pairs
from test_quant_stored import BLOCKS, BNB4, BNB8, FP8, INT8, MODELOPT, compressed, floating, folder_of, grouped

from tokenmill.backends.accounts import stored_form
from tokenmill.backends.cpu.kind import KIND as CPU
from tokenmill.backends.cuda.explain import form_of_matrix
from tokenmill.program.ops import Part, Weight
from tokenmill.quant import _refused
from tokenmill.quant._method import while_loading
from tokenmill.quant.base import load, reader_of
from tokenmill.quant.coded import Coded
from tokenmill.quant.gguf import UNPACK
from tokenmill.weights.gguf_header import BLOCKS as SIZES

MEASURED = Path(__file__).resolve().parent.parent / "docs" / "measurements"
LOSSES, SPEEDS = (json.loads((MEASURED / f"{name}.json").read_text()) for name in ("quantization-loss", "gpu-products"))
ROWS, COLUMNS = 128, 256
ONE = torch.tensor(0.02)


def gptq(bits: int, group: int, **more: Any) -> Writer:
    """GPTQ's tensors. `more`: of `support_quant.quantized`."""

    def write(w: torch.Tensor) -> Any:
        q = support_quant.quantized(w.numpy(), bits, group, **more)
        return {name.removeprefix("m."): torch.from_numpy(a) for name, a in support_quant.gptq("m", q).items()}, w

    return write


def awq(w: torch.Tensor) -> Any:
    """AWQ's tensors."""
    q = support_quant.quantized(w.numpy(), 4, 128)
    return {name.removeprefix("m."): torch.from_numpy(a) for name, a in support_quant.awq("m", q).items()}, w


def marlin(w: torch.Tensor) -> Any:
    """Marlin's tensors."""
    q = support_quant.quantized(w.numpy(), 4, 128, sym=True)
    return {name.removeprefix("m."): torch.from_numpy(a) for name, a in support_quant.marlin("m", q).items()}, w


SCATTERED = np.random.default_rng(0).permutation(COLUMNS) // 128
GPTQ = {"quant_method": "gptq", "group_size": 128, "desc_act": False, "sym": True}
W4, W4_ZEROS, W4_ORDER = (
    packed(4, 128, dtype=torch.bfloat16, **more) for more in ({}, {"zeros": "packed"}, {"order": True})
)
FP4 = {"num_bits": 4, "type": "float"}

STORED: list[tuple[str, str, dict[str, Any], Writer]] = [
    ("gptq", "4 bits, symmetric, groups of 128", GPTQ | {"bits": 4}, gptq(4, 128, sym=True)),
    ("gptq", "4 bits, zero points", GPTQ | {"bits": 4, "sym": False}, gptq(4, 128)),
    ("gptq", "4 bits, act-order", GPTQ | {"bits": 4, "desc_act": True}, gptq(4, 128, index=SCATTERED, sym=True)),
    ("gptq", "8 bits", GPTQ | {"bits": 8}, gptq(8, 128, sym=True)),
    ("gptq", "3 bits", GPTQ | {"bits": 3}, gptq(3, 128, sym=True)),
    ("gptq", "2 bits", GPTQ | {"bits": 2}, gptq(2, 128, sym=True)),
    ("awq", "gemm, gemv", {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}, awq),
    ("marlin", "", {"quant_method": "marlin", "bits": 4, "group_size": 128}, marlin),
    ("fp8", "blocks of `weight_block_size`", BLOCKS, fp8((128, 128))),
    ("fp8", "a scale a tensor", FP8, fp8((0, 0), shape=(), activation_scale=ONE)),
    ("fp8", "e5m2", FP8 | {"fmt": "e5m2"}, fp8((0, 0), "weight_scale", torch.float8_e5m2, shape=())),
    ("fbgemm_fp8", "", {"quant_method": "fbgemm_fp8"}, fp8((1, 0), "weight_scale")),
    ("compressed-tensors", "W4A16, `pack-quantized`", grouped(4, 128), W4),
    ("compressed-tensors", "W4A16, zero points", grouped(4, 128, symmetric=False), W4_ZEROS),
    ("compressed-tensors", "W4A16, act-order", grouped(4, 128, actorder="group"), W4_ORDER),
    ("compressed-tensors", "W8A16", grouped(8, 0), packed(8, dtype=torch.bfloat16)),
    ("compressed-tensors", "W8A8, `int-quantized`", INT8, int8()),
    ("compressed-tensors", "FP8, `float-quantized`", floating("channel"), fp8((1, 0), "weight_scale")),
    (
        "compressed-tensors", "FP8 in blocks", floating("block", block_structure=[128, 128]),
        fp8((128, 128), "weight_scale"),
    ),
    (
        "compressed-tensors", "NVFP4",
        compressed("nvfp4-pack-quantized", **FP4, strategy="tensor_group", group_size=16),
        nvfp4("weight_packed", "weight_global_scale", divides=True),
    ),
    ("compressed-tensors", "MXFP4", compressed("mxfp4-pack-quantized", **FP4, group_size=32), mxfp4),
    ("bitsandbytes", "int8", BNB8, int8("SCB", 127.0)),
    ("bitsandbytes", "NF4, double quantization or not", BNB4, four_bits("nf4", nested=True)),
    ("bitsandbytes", "FP4", BNB4 | {"bnb_4bit_quant_type": "fp4"}, four_bits("fp4")),
    ("modelopt", "FP8", MODELOPT, fp8((0, 0), "weight_scale", shape=())),
    ("modelopt", "NVFP4", MODELOPT | {"quant_algo": "NVFP4"}, nvfp4("weight", "weight_scale_2", divides=False)),
]  # fmt: skip
"""Name in `quant_method`, what is stored, description, writer"""

HEAD = """# Quantized weights

This page is made from the readers of `tokenmill/quant` and the backends' own choice of forms: see
`tests/support_quant_table.py`.

A checkpoint's method is found in config.json (`quantization_config`, or `compression_config`), quantize_config.json,
quant_config.json or hf_quant_config.json, or it is a GGUF file. It needs no option; `--quantize` may name it, as in
TGI, and is refused if it names another. Modules that the checkpoint stores plain stay plain, and modules of a model may
be stored in unlike forms. `tokenmill doctor`, the log and `/info` (`weights`) report the forms of a model's matrices:
how many, how they are stored, and how products read them here.

* **On a CPU** products read the form in the column *CPU*, one of `backends/cpu/forms.py`, with activations of 8 bits;
  *f16*: the matrix is dequantized to float16 at load.
* **On an NVIDIA GPU** products read the form in the column *NVIDIA*. *packed*: the codes stay as they are, and become
  16 bits in the kernel, or in a buffer of one matrix for products of many rows. *FP8*: up to UP_TO rows of a step the
  same; more rows are quantized, too, and multiplied by FP8 tensor cores (compute capability 8.9 or later; else
  *packed*). `--dtype float32` dequantizes at load. *Time*: with SOME rows, of a layer's four products of the
  8B shape, as a share of bf16's in the same run, on an H200 (docs/measurements/gpu-products.json); empty where none was
  measured. Whole steps: [performance](performance.md).
  Experts are read *packed* for any number of rows, FP8 ones, too, with activations of 16 bits. Those of a layer whose
  experts are not all in one form are dequantized at load.
* **`backends/torch`** dequantizes every matrix at load, to the computation's dtype.

Methods that quantize activations, too (W8A8, static `input_scale`): FP8 does so on a GPU as above, with the static
scale if there is one. Elsewhere, and for int8, NVFP4 and MXFP4, the weights alone are quantized here, which is more
exact than what the checkpoint was made for. fbgemm's bound of activations (`activation_scale_ub`) is not applied.

## In checkpoints

| `quant_method` | Stored | As read | CPU | NVIDIA | Time |
|---|---|---|---|---|---|
"""

MADE = """
## Made at load

`--quantize NAME` quantizes the matrices of an unquantized checkpoint. Routers stay as stored, and but for int8 and int4
so do embedding tables and output layers. *Perplexity*: that of TEXTS tokens of fixed text, by SmolLM2-135M-Instruct,
against the weights before, with the standard error of the difference; *KL*: mean divergence of the distributions of the
next token, in nats; *same*: share of places with the same likeliest token. Rounding of weights alone, by
`python -m bench.quantization_loss` (docs/measurements/quantization-loss.json). The model is small, so its losses are
larger than those of models that are usually quantized. Its weights come from a GGUF file of 4 bits with blocks of 32:
int4, which has the same blocks, reproduces them nearly, and its row holds for that only.

| `--quantize` | As made | CPU | NVIDIA | Time | Perplexity | KL | Same |
|---|---|---|---|---|---|---|---|
"""

GGUF = """
## GGUF

| Types | As read | CPU | NVIDIA | Time |
|---|---|---|---|---|
"""

REFUSED = """
## Refused

These methods are known, and refused by name:

| `quant_method` | Why | Serve instead |
|---|---|---|
"""


def read_back(about: dict[str, Any], write: Writer) -> Coded:
    """Return a matrix as a checkpoint of it is read."""
    rows = ROWS if about["quant_method"] != "gptq" else 32  # its writer is slow
    with tempfile.TemporaryDirectory() as name:
        parts, _ = write(torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(0)))
        source = folder_of(Path(name), about, {f"l.0.a.{suffix}": part for suffix, part in parts.items()})
        return load(Weight((Part("l.0.a.weight", rows),), COLUMNS), source, reader_of(source))


def cells(matrix: Coded) -> tuple[str, str, str, str]:
    """Return how a matrix is read, its forms on a CPU and on a GPU, and the measured time there."""
    cpu, gpu = CPU.form([matrix], "product", "float32"), form_of_matrix([matrix], "product", "bfloat16", fp8=True)
    known = SPEEDS["shares"] if matrix.order is None else {}  # measured without a reordering of activations
    name = _short(gpu).removeprefix("packed as ")
    shares = known.get(f"{name}, blocks" if name == "FP8" and matrix.block[1] else name, ())
    return stored_form(matrix), _short(cpu), _short(gpu), " / ".join(f"{share:.2f}" for share in shares)


def _short(form: str) -> str:
    """Return a form without what the page's head explains."""
    form = form.replace("converted to ", "").partition(" at load: no kernel")[0]
    return "FP8" if form.startswith("FP8;") else form


def stored() -> list[str]:
    """Return the lines of methods in checkpoints."""
    lines = [(method, what, *cells(read_back(about, write))) for method, what, about, write in STORED]
    return [*map(_line, lines), _line(("mxfp4", "gpt-oss's experts", *cells(_experts())))]


def _experts() -> Coded:
    codes, exponents, _ = mx(torch.randn(ROWS, COLUMNS))
    tensors = {"l.0.w_blocks": pairs(codes).reshape(1, ROWS, -1, 16), "l.0.w_scales": exponents[None]}
    with tempfile.TemporaryDirectory() as name:
        source = folder_of(Path(name), {"quant_method": "mxfp4"}, tensors)
        return load(Weight((Part("l.0.w", ROWS, index=0),), COLUMNS), source, reader_of(source))


def made() -> list[str]:
    """Return the lines of methods of --quantize, with the measured losses."""
    losses = {row["method"]: row for row in LOSSES["methods"]}
    lines = []
    with tempfile.TemporaryDirectory() as name:
        source = folder_of(Path(name), {}, {"l.0.a.weight": torch.randn(ROWS, COLUMNS)})
        for method in while_loading():
            matrix = load(Weight((Part("l.0.a.weight", ROWS),), COLUMNS), source, reader_of(source, method))
            lines.append(_line((f"`{method}`", *cells(matrix), *_loss(losses[method]))))
    return lines


def _loss(row: dict[str, Any]) -> tuple[str, str, str]:
    change = f"{100 * row['difference']:+.2f} % ± {100 * row['error']:.2f}"
    return change, f"{row['kl']:.4f}", f"{100 * row['same_likeliest']:.1f} %"


def ggufs() -> list[str]:
    """Return a line for each form of GGUF's types."""
    found: dict[tuple[str, ...], list[str]] = {}
    for kind, unpack in UNPACK.items():
        elements, size = SIZES[kind]
        raw = np.zeros((16, 1024 // elements, size), np.uint8)
        found.setdefault(cells(unpack(raw)), []).append(kind)
    return [_line((", ".join(kinds), *forms)) for forms, kinds in found.items()]


def refused() -> list[str]:
    """Return the lines of methods that are not read."""
    return [_line((f"`{name}`", why, instead)) for name, (why, instead) in sorted(_refused.METHODS.items())]


def _line(texts: tuple[str, ...]) -> str:
    return "| " + " | ".join(texts) + " |"


def page() -> str:
    """Return the page."""
    from tokenmill.backends.cuda.products.fp8_shapes import WEIGHT_ONLY, WEIGHT_ONLY_BLOCKED

    up_to = f"{WEIGHT_ONLY} rows ({WEIGHT_ONLY_BLOCKED} with scales of blocks)"
    tokens, at = f"{LOSSES['tokens']:,}", " / ".join(map(str, SPEEDS["rows"]))
    parts: list[tuple[str, Callable[[], list[str]]]] = [
        (HEAD.replace("UP_TO rows", up_to).replace("SOME", at), stored),
        (MADE.replace("TEXTS", tokens), made), (GGUF, ggufs), (REFUSED, refused),
    ]  # fmt: skip
    return "".join(head + "\n".join(lines()) + "\n" for head, lines in parts)


if __name__ == "__main__":
    print(page(), end="")
