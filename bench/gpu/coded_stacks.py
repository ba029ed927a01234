"""Random matrices of experts that stay quantized, by format, for measurements."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tokenmill.backends.cuda.expert_banks import CodedStack, Stack
from tokenmill.backends.cuda.products.coded import Lookup
from tokenmill.backends.cuda.products.forms import ROWS, Form
from tokenmill.backends.cuda.products.tables import lookup
from tokenmill.program.ops import Weight
from tokenmill.quant.formats import FORMATS

FORMS = {
    "int4": Form("int4", "scale", 128, 64),
    "awq": Form("int4", "zero", 128, 64),
    "int4-32": Form("int4", "scale", 32, 32),
    "mxfp4": Form("e2m1", "scale", 32, 32),
    "nf4": Form("table", "scale", 64, 64),
    "q4_k": Form("int4", "low", 32, 32),
    "fp8": Form("e4m3", "row", 0, 64),
    "fp8-block": Form("e4m3", "scale", 128, 64),
    "int8": Form("int8", "row", 0, 64),
    "q8_0": Form("int8", "scale", 32, 32),
}
"""Name of a checkpoint's format -> form on the device"""


def drawn(form: Form, experts: int, rows: int, columns: int, draw: torch.Generator) -> CodedStack:
    """Return random matrices of experts. Any bits are codes; scales bring the numbers to a size of about 0.03."""
    device = draw.device
    blocks, height = -(-columns // form.block), -(-rows // ROWS) * ROWS
    codes = torch.empty(experts, height // ROWS, blocks, ROWS, form.depth, dtype=torch.int16, device=device)
    for each in codes:
        each.copy_(torch.randint(-32768, 32768, each.shape, dtype=torch.int16, device=device, generator=draw))
    size = {"int4": 5.0, "e2m1": 3.0, "table": 0.5, "int8": 70.0, "e4m3": 100.0, "e5m2": 1e4}[form.kind]

    def scales(*shape: int) -> Tensor:
        return (torch.rand(shape, device=device, generator=draw) + 0.5) * (0.03 / size)

    if form.meta == "row":
        meta = scales(experts, height)
    elif form.meta == "scale" and form.block == form.group:
        meta = scales(experts, blocks, 1, height).view(torch.int32)
    else:
        below = scales(experts, blocks, form.words, height).half()
        if form.meta == "zero":
            zeros = torch.randint(0, 16, below.shape, device=device, generator=draw)
            above = (zeros + (128 if form.slices == 4 else 0)).bfloat16().view(torch.int16)
        else:
            above = scales(*below.shape).half().view(torch.int16)
        meta = torch.stack((below.view(torch.int16), above), -1).view(torch.int32)[..., 0].contiguous()
    table = None
    if form.kind == "table":
        table = Lookup(lookup("nf4", False), torch.from_numpy(FORMATS["nf4"].table).to(device))
    return CodedStack(form, codes, meta, torch.ones(experts, device=device), table)


def numbers(stack: Stack, weight: Weight) -> Iterator[Tensor]:
    """Yield the matrices of a stack, of which `weight` is one, in 16 bits: by the kernel that unpacks single ones."""
    if isinstance(stack, Tensor):
        yield from stack
        return
    for i in range(len(stack.codes)):
        out = torch.empty(weight.rows, weight.columns, dtype=torch.bfloat16, device=stack.codes.device)
        stack.matrix(i, (weight.rows, weight.columns)).unpack(out)
        yield out
