"""Read this rank's share of the weights into tensors, in parallel, with progress."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from tokenmill.backends.kind import Report
from tokenmill.parallel.group import Group
from tokenmill.program.cost import weights_of
from tokenmill.program.ops import Weight
from tokenmill.program.value import Program
from tokenmill.quant.base import Coded, Reader, check, for_each, load, load_parts
from tokenmill.weights.checkpoint import Checkpoint

_CHUNK = 1 << 20  # elements converted at a time
_STORED = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


def pack(
    program: Program,
    source: Checkpoint,
    read: Reader,
    group: Group,
    dtype: torch.dtype,
    device: torch.device,
    report: Report | None = None,
) -> dict[Weight, Tensor]:
    """Return every weight of a (sharded) program. Raise ModelError if a tensor is missing or has another shape.

    `report` is called from this thread, with bytes of the checkpoint.
    """
    wanted = weights_of(program)
    check(weights_of(program.model), source)

    def one(weight: Weight) -> Tensor:
        if not weight.columns:
            return to_tensor(load(weight, source, read, group.rank), dtype).to(device)
        return stacked(load_parts(weight, source, read, group.rank), dtype).to(device)

    return for_each(wanted, source, one, max(1, min(4, torch.get_num_threads())), report)


def to_tensor(matrix: Coded, dtype: torch.dtype) -> Tensor:
    """Return a tensor with its own memory."""
    out = torch.empty(matrix.shape, dtype=dtype)
    _fill(out, matrix)
    return out


def stacked(parts: Sequence[Coded], dtype: torch.dtype) -> Tensor:
    """Return matrices one below the other in a tensor with its own memory."""
    out = torch.empty((sum(part.shape[0] for part in parts), parts[0].shape[1]), dtype=dtype)
    first = 0
    for part in parts:
        _fill(out[first : first + part.shape[0]], part)
        first += part.shape[0]
    return out


def _fill(out: Tensor, matrix: Coded) -> None:
    """Write numbers into a contiguous tensor of the same shape."""
    if matrix.dense and matrix.format == _STORED.get(out.dtype):
        bits = out.view(torch.int16).numpy().view(np.uint16) if out.dtype == torch.bfloat16 else out.numpy()
        np.copyto(bits, matrix.codes)
    elif out.dtype == torch.float32:
        matrix.fill(out.numpy())
    else:
        step = max(1, _CHUNK // max(1, prod(matrix.shape[1:])))
        for start in range(0, len(out), step):
            some = slice(start, min(start + step, len(out)))
            out[some] = torch.from_numpy(matrix.take(some, slice(None)).floats())
