"""Collective operations through the host, for kernels under Triton's interpreter (tests)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from tokenmill.backends.cuda.collectives.base import Normed
from tokenmill.backends.cuda.collectives.nccl import append
from tokenmill.backends.cuda.sizes import Sizes
from tokenmill.backends.torch.kinds import normed as norm
from tokenmill.parallel.group import Group


class Host:
    """Implements `base.Collectives`: every operation is an exchange of bytes."""

    nbytes = 0

    def __init__(self, group: Group) -> None:
        self.rank, self.size, self._group = group.rank, group.size, group

    def parts(self, x: Tensor) -> list[Tensor]:
        """Return the ranks' x."""
        data = x.contiguous().view(torch.uint8).numpy().tobytes()
        found = self._group.exchange(data)
        return [torch.frombuffer(bytearray(each), dtype=x.dtype).view(x.shape) for each in found]

    def reduction(self, x: Tensor, out: Tensor, normed: Normed | None = None) -> HostReduction:
        """See `Collectives`."""
        return HostReduction(self, x, out, normed)

    def gathering(self, x: Tensor, out: Tensor, first_only: bool) -> HostGathering:
        """See `Collectives`."""
        return HostGathering(self, x, out)

    def spreading(self, chosen: Tensor, tokens: Tensor) -> HostSpreading:
        """See `Collectives`."""
        return HostSpreading(self, chosen, tokens)

    def agree(self, ok: bool) -> bool:
        """See `Collectives`."""
        return bool(self._group.minimum(int(ok)))

    def unlaunched(self) -> AbstractContextManager[None]:
        """See `Collectives`."""
        return nullcontext()

    def started(self) -> None:
        """See `Collectives`."""

    def check(self) -> None:
        """See `Collectives`. The group raises by itself."""

    def close(self) -> None:
        """See `Collectives`."""


class HostReduction:
    """Implements `base.Reduction`."""

    def __init__(self, host: Host, x: Tensor, out: Tensor, normed: Normed | None) -> None:
        self._host, self._x, self._out, self._normed = host, x, out, normed

    def norms(self, rows: int) -> bool:
        """See `Reduction`."""
        return self._normed is not None

    def run(self, rows: int, early: bool = False) -> None:
        """See `Reduction`."""
        self._sum(rows, self._out)

    def _sum(self, rows: int, out: Tensor) -> None:
        parts = [part.float() for part in self._host.parts(self._x[:rows])]
        out[:rows].copy_(sum(parts[1:], parts[0]))

    def run_normed(self, rows: int, early: bool = False) -> None:
        """See `Reduction`."""
        assert self._normed is not None
        y, weight, bias, total, out, eps, center = self._normed
        added = None if y is None else y[:rows].clone()
        self._sum(rows, total)
        if added is not None:
            total[:rows].add_(added)
        out[:rows].copy_(norm(total[:rows], weight, bias, eps, center, 0))


class HostGathering:
    """Implements `base.Gathering`, on all ranks."""

    def __init__(self, host: Host, x: Tensor, out: Tensor) -> None:
        self._host, self._x, self._out = host, x, out

    def run(self, rows: int) -> None:
        """See `Gathering`."""
        self._out[:rows].copy_(torch.cat(self._host.parts(self._x[:rows]), -1)[:, : self._out.shape[1]])


class HostSpreading:
    """Implements `base.Spreading`."""

    def __init__(self, host: Host, chosen: Tensor, tokens: Tensor) -> None:
        self._host, self._chosen, self._tokens = host, chosen, tokens

    def run(self, sizes: Sizes, rows: int) -> None:
        """See `Spreading`."""
        chosen = self._chosen[:rows]
        chosen.copy_(self._host.parts(chosen)[0])
        append(chosen, self._tokens, sizes)
