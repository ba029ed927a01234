"""Operations of single architectures. Only `backends/torch` has kernels for them."""

from __future__ import annotations

from tokenmill.program.ops import Op, Weight
from tokenmill.program.value import Value


class ScaleByPosition(Op):
    """Compute x · (1 + beta · ln(1 + ⌊position / length⌋))."""

    rowwise = False
    x: Value
    beta: float
    length: int


class XIelu(Op):
    """Compute xIELU (arXiv:2411.13010), whose slopes are the softplus of two trained numbers."""

    x: Value
    alpha_p: Weight
    alpha_n: Weight
