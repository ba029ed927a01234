"""State that the operations of one step share."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenmill.backends.torch.attention import AttentionPlan, Scratch
from tokenmill.backends.torch.states import StatePlan
from tokenmill.parallel.gloo import Collectives
from tokenmill.parallel.pipes import Pipes
from tokenmill.program.ops import Weight
from tokenmill.program.rope import RopeTable


@dataclass(slots=True)
class StepState:
    """State that the operations of one step share, besides values."""

    weights: dict[Weight, Tensor]
    cache: dict[int, Tensor]  # by layer: (2, places, key-value heads · head size)
    group: Collectives
    positions: Tensor  # (T,)
    attention: dict[int, AttentionPlan]  # by layer
    samples: Tensor  # (R,) indices among the T tokens
    scratch: Scratch
    recurrent: StatePlan
    dtype: torch.dtype = torch.float32  # of the values
    stages: Pipes | None = None  # the stages before and after this one
    tables: dict[RopeTable, tuple[Tensor, Tensor]] = field(default_factory=dict)  # of cos_sin

    def optional(self, weight: Weight | None) -> Tensor | None:
        """Return the weight, or None for None."""
        return None if weight is None else self.weights[weight]

    def cos_sin(self, table: RopeTable, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, each (T, 1, rotary_dim / 2). Computed once a step."""
        if table not in self.tables:
            if table.moves:
                inverse = torch.from_numpy(table.frequencies_at(self.positions.cpu().numpy()))
            else:
                inverse = torch.from_numpy(table.inverse_frequencies())[None]
            angle = self.positions[:, None].float() * inverse.to(self.positions.device)
            cos, sin = (t[:, None] * table.magnitude() for t in (angle.cos(), angle.sin()))
            self.tables[table] = cos.to(dtype), sin.to(dtype)
        return self.tables[table]
