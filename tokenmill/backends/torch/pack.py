"""Read this rank's share of the weights into tensors, in parallel, with progress."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tokenmill.backends.kind import Report
from tokenmill.parallel.group import Group
from tokenmill.program.cost import weights_of
from tokenmill.program.ops import Weight
from tokenmill.program.value import Program
from tokenmill.quant.base import Coded, Reader, check, for_each, load
from tokenmill.weights.checkpoint import Checkpoint


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
    check(wanted, source)

    def one(weight: Weight) -> Tensor:
        return to_tensor(load(weight, source, read, group.rank), dtype).to(device)

    return for_each(wanted, source, one, max(1, min(4, torch.get_num_threads())), report)


def to_tensor(matrix: Coded, dtype: torch.dtype) -> Tensor:
    """Return a tensor with its own memory."""
    if matrix.dense and matrix.format == "bf16" and dtype == torch.bfloat16:
        return torch.from_numpy(matrix.codes.view(np.int16).copy()).view(torch.bfloat16)
    out = torch.empty(matrix.shape, dtype=torch.float32)
    matrix.fill(out.numpy())
    return out.to(dtype)
