"""Collective operations by NCCL's library, which torch's builds for CUDA bring. Graphs may capture them.

The library is called directly, so that there is no thread that watches it and no store of torch's beside the group. The
launcher of the ranks turns NVLink multicast off in its environment (NCCL_NVLS_ENABLE).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes.util import find_library

import torch
from torch import Tensor

from tokenmill.backends.cuda.collectives.base import Normed
from tokenmill.backends.cuda.sizes import Sizes
from tokenmill.parallel.group import Group

_ID_BYTES, _SUM = 128, 0
_KINDS = {torch.int32: 2, torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}


class NcclError(RuntimeError):
    """A call of the library failed."""


class _Id(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * _ID_BYTES)]


class Nccl:
    """Implements the operations of `base.Collectives` for ranks that each have a card of their own.

    The constructor blocks until all ranks of the group have called theirs. Raises OSError if the library is missing.
    `quiet`: nothing is launched.
    """

    nbytes = 0

    def __init__(self, group: Group) -> None:
        self.rank, self.size, self.quiet = group.rank, group.size, False
        self._library, self._comm, made = load(), ctypes.c_void_p(), _Id()
        if group.rank == 0:
            self._call("ncclGetUniqueId", ctypes.byref(made))
        given = group.exchange(ctypes.string_at(ctypes.byref(made), _ID_BYTES) if group.rank == 0 else b"")
        ctypes.memmove(ctypes.byref(made), given[0], _ID_BYTES)
        self._call("ncclCommInitRank", ctypes.byref(self._comm), self.size, made, self.rank)

    def all_reduce(self, x: Tensor, out: Tensor) -> None:
        """Launch out = Σ x."""
        self._launch("ncclAllReduce", *_pointers(x, out), _count(x), _KINDS[x.dtype], _SUM, self._comm, _stream())

    def all_gather(self, x: Tensor, out: Tensor) -> None:
        """Launch out (ranks, *x) = the ranks' x."""
        self._launch("ncclAllGather", *_pointers(x, out), _count(x), _KINDS[x.dtype], self._comm, _stream())

    def broadcast(self, x: Tensor) -> None:
        """Launch x = rank 0's x."""
        self._launch("ncclBroadcast", *_pointers(x, x), _count(x), _KINDS[x.dtype], 0, self._comm, _stream())

    def reduction(self, x: Tensor, out: Tensor, normed: Normed | None = None) -> NcclReduction:
        """See `Collectives`."""
        return NcclReduction(self, x, out)

    def gathering(self, x: Tensor, out: Tensor, first_only: bool) -> NcclGathering:
        """See `Collectives`."""
        return NcclGathering(self, x, out)

    def spreading(self, chosen: Tensor, tokens: Tensor) -> NcclSpreading:
        """See `Collectives`."""
        return NcclSpreading(self, chosen, tokens)

    def close(self) -> None:
        """End the communicator, also if another rank is gone. Idempotent."""
        if self._comm:
            self._library.ncclCommAbort(self._comm)
            self._comm = ctypes.c_void_p()

    def _launch(self, name: str, *arguments: object) -> None:
        if not self.quiet:
            self._call(name, *arguments)

    def _call(self, name: str, *arguments: object) -> None:
        error = getattr(self._library, name)(*arguments)
        if error != 0:
            text = ctypes.c_char_p(self._library.ncclGetErrorString(error)).value or b""
            raise NcclError(f"{name} failed on rank {self.rank}: {text.decode()}")


class NcclReduction:
    """Implements `base.Reduction`."""

    def __init__(self, nccl: Nccl, x: Tensor, out: Tensor) -> None:
        self._nccl, self._x, self._out = nccl, x, out

    def norms(self, rows: int) -> bool:
        """See `Reduction`."""
        return False

    def run(self, rows: int, early: bool = False) -> None:
        """See `Reduction`."""
        self._nccl.all_reduce(self._x[:rows], self._out[:rows])

    def run_normed(self, rows: int, early: bool = False) -> None:
        """Raise: `norms` is never true."""
        raise NotImplementedError


class NcclGathering:
    """Implements `base.Gathering`, on all ranks."""

    def __init__(self, nccl: Nccl, x: Tensor, out: Tensor) -> None:
        self._nccl, self._x, self._out = nccl, x, out
        self._parts = torch.empty(nccl.size, *x.shape, dtype=x.dtype, device=x.device).view(-1)

    def run(self, rows: int) -> None:
        """See `Gathering`."""
        x, size, columns = self._x[:rows], self._nccl.size, self._x.shape[1]
        parts = self._parts[: size * x.numel()].view(size, rows, columns)
        self._nccl.all_gather(x, parts)
        for rank in range(size):
            first = rank * columns
            width = min(columns, self._out.shape[1] - first)
            if width > 0:
                self._out[:rows, first : first + width].copy_(parts[rank, :, :width])


class NcclSpreading:
    """Implements `base.Spreading`."""

    def __init__(self, nccl: Nccl, chosen: Tensor, tokens: Tensor) -> None:
        self._nccl, self._chosen, self._tokens = nccl, chosen, tokens

    def run(self, sizes: Sizes, rows: int) -> None:
        """See `Spreading`."""
        chosen = self._chosen[:rows]
        self._nccl.broadcast(chosen)
        append(chosen, self._tokens, sizes)


def append(chosen: Tensor, tokens: Tensor, sizes: Sizes) -> None:
    """Append the chosen ids to the tokens of the slots."""
    pairs = sizes.pairs.view(-1, 2)
    pairs = pairs[: len(chosen)] if sizes.samples is None else pairs[sizes.samples[: len(chosen)].long()]
    tokens[pairs[:, 0].long(), pairs[:, 1].long() + 1] = chosen.clamp(min=0)


def load() -> ctypes.CDLL:
    """Return the library. Raises OSError if it is missing."""
    torch.cuda.is_available()  # torch has loaded its own
    names: Sequence[str | None] = ("libnccl.so.2", find_library("nccl"))
    for name in filter(None, names):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.ncclGetErrorString.restype = ctypes.c_char_p
        return library
    raise OSError("libnccl.so.2 is not there")


def _pointers(x: Tensor, out: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    return ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr())


def _stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def _count(x: Tensor) -> ctypes.c_size_t:
    return ctypes.c_size_t(x.numel())
