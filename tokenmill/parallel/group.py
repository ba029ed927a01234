"""Collective operations of the ranks that share a model.

With one rank, every operation is the identity and torch is not needed. Invariant: all ranks make the same calls in the
same order, each from one thread at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from tokenmill.extras import need_torch

if TYPE_CHECKING:
    from torch import Tensor

_TIMEOUT = timedelta(minutes=30)  # ends a collective whose peer died; idle ranks are not in a collective


@dataclass(frozen=True, slots=True)
class Group:
    """Process group, seen from rank `rank` of `size`. `connect` creates a group of more than one rank."""

    rank: int = 0
    size: int = 1

    @classmethod
    def connect(cls, rank: int, size: int, init_method: str) -> Group:
        """Join the other ranks; blocks until all have joined. `init_method`: as torch.distributed's, e.g. "file:///…".

        Raises MissingPackage if `size` is more than one and torch is not installed.
        """
        if size > 1:
            need_torch(f"Sharing a model between {size} ranks (--num-shard)")
            import torch.distributed as dist

            dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=size, timeout=_TIMEOUT)
        return cls(rank, size)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over the ranks, on every rank. `x` is not modified."""
        if self.size == 1:
            return x
        import torch.distributed as dist

        x = x.clone()
        dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Concatenate the ranks' columns, on every rank: (rows, width) -> (rows, width * size)."""
        if self.size == 1:
            return x
        import torch
        import torch.distributed as dist

        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x)
        return torch.cat(parts, dim=-1)

    def broadcast(self, x: Tensor) -> Tensor:
        """Return rank 0's `x` on every rank. On other ranks, `x` has the same shape and type and is overwritten."""
        if self.size > 1:
            import torch.distributed as dist

            dist.broadcast(x, 0)
        return x

    def minimum(self, n: int) -> int:
        """Return the minimum of `n` over the ranks."""
        if self.size == 1:
            return n
        import torch
        import torch.distributed as dist

        least = torch.tensor([n], dtype=torch.int64)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least.item())

    def close(self) -> None:
        """Leave the group. With gloo, a rank that exits without it can abort another rank. Idempotent."""
        if self.size > 1:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()
