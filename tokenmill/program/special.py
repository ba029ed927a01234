"""Operations of single architectures."""

from __future__ import annotations

from typing import ClassVar

from tokenmill.program.ops import Op, Weight
from tokenmill.program.value import Value


class ScaleByPosition(Op):
    """Compute x · (1 + beta · ln(1 + ⌊(position + offset) / length⌋))."""

    rowwise = False
    x: Value
    beta: float
    length: int
    offset: int = 0


class XIelu(Op):
    """Compute xIELU (arXiv:2411.13010), whose slopes are the softplus of two trained numbers."""

    x: Value
    alpha_p: Weight
    alpha_n: Weight


class Clip(Op):
    """Bound x: at least -limit and at most limit."""

    x: Value
    limit: float


class ScaleByWeight(Op):
    """Compute x · weight, which has a number for each column or one for all."""

    x: Value
    weight: Weight


class ScaleByExpert(Op):
    """Compute factors · weight[ids]: the factor of each chosen expert times the expert's own number."""

    factors: Value
    ids: Value
    weight: Weight


class Within(Op):
    """Replace ids that are not less than `rows` by 0."""

    rowwise = False
    ids: Value
    rows: int


class Moments(Op):
    """Compute Σx and Σx² of each row, times `share`, for the operations of a row that ranks share."""

    x: Value
    share: float


class NormOfShare(Op):
    """Apply RMSNorm to a rank's part of a row of so many `columns`. `moments`: of the whole row."""

    x: Value
    moments: Value
    weight: Weight | None
    eps: float
    columns: int


class Sparsify(Op):
    """Compute relu(x - mean - deviations · standard deviation), both of the row.

    `moments`: of the whole row, of which x is a rank's part; `columns`: of the whole row.
    """

    whole_rows: ClassVar[bool] = True
    x: Value
    deviations: float
    moments: Value | None = None
    columns: int = 0


class WithMagnitude(Op):
    """Compute x · rms(like) / max(rms(x), least), of each part of x that is as wide as `like`."""

    whole_rows: ClassVar[bool] = True
    x: Value
    like: Value
    least: float


class Beside(Op):
    """Concatenate the columns of x and y."""

    x: Value
    y: Value


class MixStreams(Op):
    """Compute stream[j] + Σ factors[j · streams + i] · stream[i] (AltUp's prediction, arXiv:2301.13310).

    `x`: the streams side by side. `factors`: (rows, streams²).
    """

    x: Value
    factors: Value


class CorrectStreams(Op):
    """Compute stream[j] + (1 + factors[j]) · (y - stream[0]) (AltUp's correction).

    `x`: the streams side by side. `factors`: (rows, streams).
    """

    x: Value
    y: Value
    factors: Value


class AddToOthers(Op):
    """Add y to all streams but the first. `x`: the streams side by side, each as wide as y."""

    x: Value
    y: Value
