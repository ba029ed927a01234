"""Collective operations by our own kernels, in memory that all ranks can write to (`kernels/ranks.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from tokenmill.backends.cuda.collectives.base import Needs, Normed, RankAbsent
from tokenmill.backends.cuda.collectives.choice import Limits
from tokenmill.backends.cuda.kernels import ranks as kernels
from tokenmill.backends.cuda.launch import Site, ahead
from tokenmill.backends.cuda.shapes import power
from tokenmill.backends.cuda.sizes import Sizes

_ROOM = 32 << 20  # bytes at most that one kind of operation has of each of two places
_ALIGNED = 256
TILE_BYTES = 4096
_MOST_TILES = 512
_GATHERED = 2048  # columns of a program
_TOKENS = 64  # of a program
_VECTOR = 8  # numbers that are loaded and stored at once
POLLS_S = 1 << 20  # reads of a flag in a second, about


class Channel(NamedTuple):
    """Memory of one kind of operation: offsets in bytes, rows or tiles that there is room for, bytes of one."""

    data: int
    flags: int
    counts: int  # place among the counters
    room: int
    stride: int
    chunks: int = 1  # programs of a row


@dataclass(frozen=True, slots=True)
class Layout:
    """Division of the memory that each rank shares: `rows`, `tiles`, `gathered` and `tokens` are its channels."""

    size: int
    rows: Channel
    tiles: Channel
    gathered: Channel
    tokens: Channel
    nbytes: int
    counters: int

    @classmethod
    def of(cls, needs: Needs, size: int) -> Layout:
        """Divide memory for `size` ranks."""
        end, counters = 0, 0
        made = list[Channel]()

        def take(nbytes: int) -> int:
            nonlocal end
            end, start = -(-(end + nbytes) // _ALIGNED) * _ALIGNED, end
            return start

        stride = -(-max(needs.row_bytes, 8) // _ALIGNED) * _ALIGNED
        columns = -(-max(needs.columns, 1) * needs.item_bytes // _ALIGNED) * _ALIGNED
        chunks = -(-max(needs.columns, 1) // _GATHERED)
        message = needs.rows * stride
        kinds = (  # room, stride, chunks, places of a program's numbers, flags of a program
            (max(1, min(needs.rows, _ROOM // (size * stride))), stride, 1, size, 1),
            (max(1, min(_MOST_TILES, -(-message // (size * TILE_BYTES)))), TILE_BYTES, 1, 2 * size, 2),
            (max(1, min(needs.samples, _ROOM // (size * columns))), columns, chunks, size, 1),
            (-(-needs.samples // _TOKENS), _TOKENS * 4, 1, 1, 1),
        )  # fmt: skip
        for room, each, chunks, places, flags in kinds:
            data = take(2 * room * places * each)
            made.append(Channel(data, take(room * chunks * flags * size * 4), counters, room, each, chunks))
            counters += room * chunks
        rows, tiles, gathered, tokens = made
        return cls(size, rows, tiles, gathered, tokens, end, counters)


@dataclass(frozen=True, slots=True)
class Shared:
    """Memory of a rank that the others write to. `own` (bytes,) uint8, zero at first.

    `deltas` (ranks,) int64 on the device: bytes from `own` to each rank's memory.
    """

    rank: int
    own: Tensor
    deltas: Tensor


class Peers:
    """Implements `base.Collectives` but `agree` and `close`, which need no kernel. `limits`: see `choice`."""

    def __init__(self, shared: Shared, layout: Layout, limits: Limits, patience_s: float = 30.0) -> None:
        self.rank, self.layout, self.limits = shared.rank, layout, limits
        self._own, self._deltas, device = shared.own, shared.deltas, shared.own.device
        self.counts = torch.zeros(layout.counters, dtype=torch.int32, device=device)
        self._polls = torch.zeros(1, dtype=torch.int32, device=device)
        self.fault = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.wait_up_to(patience_s)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.layout.size

    @property
    def nbytes(self) -> int:
        """See `Collectives`."""
        return self._own.nbytes + self.counts.nbytes

    def wait_up_to(self, seconds: float) -> None:
        """Set how long kernels wait for another rank, about."""
        self._patience_s = seconds
        self._polls.fill_(int(min(seconds * POLLS_S, (1 << 31) - 1)))

    def check(self) -> None:
        """See `Collectives`."""
        if absent := int(self.fault[0]):
            raise RankAbsent(
                f"rank {absent - 1} did not take part in a collective operation of rank {self.rank} within about "
                f"{self._patience_s:.0f} s"
            )

    def operands(self, channel: Channel, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return the first arguments of a kernel, for numbers of this dtype."""
        flags = self._own[channel.flags :].view(torch.int32)
        counts = self.counts[channel.counts :]
        return self._own[channel.data :].view(dtype), flags, self._deltas, counts, self._polls, self.fault

    @property
    def sizes(self) -> dict[str, int]:
        """Constants of all kernels."""
        return {"SIZE": self.size, "LANES": power(self.size)}

    def reduction(self, x: Tensor, out: Tensor, normed: Normed | None = None) -> PeerReduction:
        """See `Collectives`."""
        return PeerReduction(self, x, out, normed)

    def gathering(self, x: Tensor, out: Tensor, first_only: bool) -> PeerGathering:
        """See `Collectives`."""
        return PeerGathering(self, x, out, first_only)

    def spreading(self, chosen: Tensor, tokens: Tensor) -> PeerSpreading:
        """See `Collectives`."""
        return PeerSpreading(self, chosen, tokens)


class PeerReduction:
    """Implements `base.Reduction`: in one shot, or in two."""

    def __init__(self, peers: Peers, x: Tensor, out: Tensor, normed: Normed | None) -> None:
        self._peers, self._x, self._out, self._normed = peers, x, out, normed
        self._one, self._two, self._with_norm = (
            Site(kernels.reduce_rows), Site(kernels.reduce_tiles), Site(kernels.reduce_rows)
        )  # fmt: skip
        self._row_bytes = x.shape[1] * x.element_size()

    def norms(self, rows: int) -> bool:
        """See `Reduction`."""
        return self._normed is not None and self.in_one_shot(rows)

    def in_one_shot(self, rows: int) -> bool:
        """Return True if so many rows are summed in one shot."""
        return rows <= self._peers.layout.rows.room and rows * self._row_bytes <= self._peers.limits.one_shot

    def run(self, rows: int, early: bool = False) -> None:
        """See `Reduction`."""
        if self.in_one_shot(rows):
            self.one_shot(rows, early)
        else:
            self.two_shots(rows, early)

    def one_shot(self, rows: int, early: bool = False) -> None:
        """Launch the sum in one shot; `rows` must have room."""
        self._rows(self._one, rows, early, None)

    def run_normed(self, rows: int, early: bool = False) -> None:
        """See `Reduction`."""
        assert self._normed is not None
        self._rows(self._with_norm, rows, early, self._normed)

    def _rows(self, launch: Site, rows: int, early: bool, normed: Normed | None) -> None:
        peers, x, width, channel = self._peers, self._x, self._x.shape[1], self._peers.layout.rows
        n = normed or Normed(None, None, None, self._out, self._out, 0.0, False)
        y, weight, bias = (x if each is None else each for each in (n.y, n.weight, n.bias))
        launch(
            (rows,),
            *peers.operands(channel, x.dtype), x, y, weight, bias, n.total, n.out, x.stride(0), y.stride(0), n.eps,
            peers.rank, **peers.sizes, ROWS=channel.room, STRIDE=channel.stride // x.element_size(), WIDTH=width,
            BLOCK=power(width), NORM=normed is not None, ADD=n.y is not None, CENTER=n.center,
            WEIGHT=n.weight is not None, BIAS=n.bias is not None, PDL=early,
            num_warps=1 if width <= 64 else 4 if width <= 2048 else 8 if width <= 8192 else 16, **ahead(early),
        )  # fmt: skip

    def two_shots(self, rows: int, early: bool = False) -> None:
        """Launch the sum in two shots, in as many pieces as the memory requires."""
        peers, channel = self._peers, self._peers.layout.tiles
        x, out, n = self._x[:rows].view(-1), self._out[:rows].view(-1), rows * self._x.shape[1]
        tile = channel.stride // x.element_size()
        at_once = channel.room * peers.size * tile
        group = _VECTOR if n % _VECTOR == 0 else 1
        for first in range(0, n, at_once):
            some, ahead_of = min(at_once, n - first), early and not first
            self._two(
                (triton.cdiv(some, peers.size * tile),),
                *peers.operands(channel, x.dtype), x[first:], out[first:], some // group, peers.rank,
                **peers.sizes, TILES=channel.room, TILE=tile, GROUP=group, PDL=ahead_of, num_warps=8,
                **ahead(ahead_of),
            )  # fmt: skip


class PeerGathering:
    """Implements `base.Gathering`."""

    def __init__(self, peers: Peers, x: Tensor, out: Tensor, first_only: bool) -> None:
        self._peers, self._x, self._out, self._first_only = peers, x, out, first_only
        self._launch = Site(kernels.gather_rows)

    def run(self, rows: int) -> None:
        """See `Gathering`."""
        peers, channel, x = self._peers, self._peers.layout.gathered, self._x
        for first in range(0, rows, channel.room):
            self._launch(
                (min(rows - first, channel.room), channel.chunks),
                *peers.operands(channel, x.dtype), x[first:], self._out[first:], x.stride(0), peers.rank,
                **peers.sizes, ROWS=channel.room, STRIDE=channel.stride // x.element_size(), COLUMNS=x.shape[1],
                WIDTH=self._out.shape[1], CHUNKS=channel.chunks, BLOCK=_GATHERED, FIRST=self._first_only, num_warps=4,
            )  # fmt: skip


class PeerSpreading:
    """Implements `base.Spreading`."""

    def __init__(self, peers: Peers, chosen: Tensor, tokens: Tensor) -> None:
        self._peers, self._chosen, self._tokens = peers, chosen, tokens
        self._launch = Site(kernels.spread_tokens)

    def run(self, sizes: Sizes, rows: int) -> None:
        """See `Spreading`."""
        peers, channel, tokens = self._peers, self._peers.layout.tokens, self._tokens
        self._launch(
            (triton.cdiv(rows, _TOKENS),),
            *peers.operands(channel, torch.int32), self._chosen, sizes.pairs,
            sizes.pairs if sizes.samples is None else sizes.samples, tokens, tokens.stride(0), rows, peers.rank,
            **peers.sizes, ROWS=channel.room * _TOKENS, SOME=sizes.samples is not None, BLOCK=_TOKENS, num_warps=2,
        )  # fmt: skip
