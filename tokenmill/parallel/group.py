"""The ranks that share a model, and what they tell each other.

One rank alone needs no torch, and every call is the identity. All ranks make the same calls in the same order, each
from one thread at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from tokenmill.extras import need_torch

if TYPE_CHECKING:
    from torch import Tensor

_TIMEOUT = timedelta(minutes=30)  # idle ranks wait in no collective; this ends what a dead peer left behind


@dataclass(frozen=True, slots=True)
class Group:
    """Rank `rank` of `size`. More than one are made by `connect`."""

    rank: int = 0
    size: int = 1

    @classmethod
    def connect(cls, rank: int, size: int, init_method: str) -> Group:
        """Meet the other ranks; blocks until all are there. `init_method`: as torch.distributed's, e.g. "file:///…".

        Raises MissingPackage if there are others, but no torch.
        """
        if size > 1:
            need_torch(f"Sharing a model between {size} ranks (--num-shard)")
            import torch.distributed as dist

            dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=size, timeout=_TIMEOUT)
        return cls(rank, size)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, on every rank; `x` stays as it is."""
        if self.size == 1:
            return x
        import torch.distributed as dist

        x = x.clone()
        dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """The ranks' columns side by side, on every rank: (rows, width) -> (rows, width * size)."""
        if self.size == 1:
            return x
        import torch
        import torch.distributed as dist

        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x)
        return torch.cat(parts, dim=-1)

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's `x` on every rank. The others give a tensor of the same shape and type, which is written to."""
        if self.size > 1:
            import torch.distributed as dist

            dist.broadcast(x, 0)
        return x

    def minimum(self, n: int) -> int:
        """The least `n` of all ranks."""
        if self.size == 1:
            return n
        import torch
        import torch.distributed as dist

        least = torch.tensor([n], dtype=torch.int64)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least.item())

    def close(self) -> None:
        """Leave. Without it a rank that exits first can abort another (gloo). Idempotent."""
        if self.size > 1:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()
