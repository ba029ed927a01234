"""Launches of operations that few architectures have: rotation on its own, a scale by position, a trained activation.

All of them change each row by itself. Those of single architectures without a kernel here are computed by torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
from torch import Tensor

from tokenmill.backends.cuda.kernels.rows import rotate_heads, scale_rows, xielu_rows
from tokenmill.backends.cuda.launch import Run, Site
from tokenmill.backends.cuda.memory import Memory
from tokenmill.backends.cuda.prepare import BY_TORCH
from tokenmill.backends.cuda.shapes import power
from tokenmill.backends.cuda.sizes import Sizes
from tokenmill.backends.torch.special import KERNELS
from tokenmill.program import ops, special
from tokenmill.program.ops import Op, Weight
from tokenmill.program.rope import RopeTable

_BLOCK = 1024


class RowLowering:
    """Lowers these operations. `weights`: vectors on the device."""

    def __init__(self, memory: Memory, weights: dict[Weight, Tensor]) -> None:
        self._memory, self._weights = memory, weights

    def by_kind(self) -> dict[type[Op], Callable[[Any], Run]]:
        """Return the function that lowers each kind."""
        made: dict[type[Op], Callable[[Any], Run]] = dict.fromkeys(BY_TORCH, self._by_torch)
        made[special.Within], made[ops.Rope] = self._within, self._rope
        made[special.ScaleByPosition], made[special.XIelu] = self._scale, self._xielu
        return made

    def _rope(self, op: ops.Rope) -> Run:
        x, out, (cos, sin) = (
            self._memory.value(op.x), self._memory.value(op.out), self._memory.cos_sin(op.rope, op.head_dim)
        )  # fmt: skip
        heads, launch = op.out.width // op.head_dim, Site(rotate_heads)

        def run(n: Sizes) -> None:
            launch(
                (n.tokens, heads),
                x, out, n.pairs, cos, sin, x.stride(0), HEADS=heads, D=op.head_dim, HALF=power(op.head_dim // 2),
                ROPE=rotation(op.rope), num_warps=1,
            )  # fmt: skip

        return run

    def _scale(self, op: special.ScaleByPosition) -> Run:
        x, out, width, launch = self._memory.value(op.x), self._memory.value(op.out), op.out.width, Site(scale_rows)

        def run(n: Sizes) -> None:
            launch(
                (n.tokens, triton.cdiv(width, _BLOCK)),
                x, out, n.pairs, x.stride(0), op.beta, LENGTH=op.length, OFFSET=op.offset, WIDTH=width, BLOCK=_BLOCK,
                num_warps=4,
            )  # fmt: skip

        return run

    def _xielu(self, op: special.XIelu) -> Run:
        x, out, width, launch = self._memory.value(op.x), self._memory.value(op.out), op.out.width, Site(xielu_rows)
        above, below = self._weights[op.alpha_p], self._weights[op.alpha_n]

        def run(n: Sizes) -> None:
            launch(
                (n.of(op.out), triton.cdiv(width, _BLOCK)),
                x, above, below, out, x.stride(0), WIDTH=width, BLOCK=_BLOCK, num_warps=4,
            )  # fmt: skip

        return run

    def _by_torch(self, op: Op) -> Run:
        out, kernel, step = self._memory.value(op.out), KERNELS[type(op)], _Step(self._weights)
        inputs = [self._memory.value(v) for v in op.reads().values()]

        def run(n: Sizes) -> None:
            rows = n.of(op.out)
            out[:rows].copy_(kernel(op, step, *(x[:rows] for x in inputs)))

        return run

    def _within(self, op: special.Within) -> Run:
        """Launch nothing: embeddings bound their ids themselves."""
        if op.ids.buffer != self._memory.program.inputs.ids.buffer:
            raise NotImplementedError("ids other than those of the step's tokens")
        return lambda n: None


class _Step(NamedTuple):
    """The part of torch's state of a step that these operations read."""

    weights: dict[Weight, Tensor]


def rotation(table: RopeTable | None) -> int:
    """Return ROPE of the kernels: the number of rotated columns, negative if pairs are adjacent columns; 0: none."""
    if table is None:
        return 0
    return -table.rotary_dim if table.interleaved else table.rotary_dim
