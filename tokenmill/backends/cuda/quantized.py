"""Quantization of activations within the kernels that compute them, planned for a whole program.

A norm, or a gated activation, stores codes in place of its result where FP8 products alone read that. And it multiplies
by the scales of the FP8 product before it, if it alone reads that: so the library's product needs no scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmill.backends.cuda.kernels.fp8_rows import gate_codes, norm_codes, quantize_rows
from tokenmill.backends.cuda.launch import Run, Site, ahead
from tokenmill.backends.cuda.memory import Memory
from tokenmill.backends.cuda.products.base import Operands, Packed
from tokenmill.backends.cuda.products.fp8 import Codes, Fp8, Fp8Product, Scales, row_warps, scale_stride
from tokenmill.backends.cuda.products.fp8_shapes import BLOCK
from tokenmill.backends.cuda.shapes import power
from tokenmill.backends.cuda.sizes import Sizes
from tokenmill.program import ops
from tokenmill.program.ops import Op, Weight
from tokenmill.program.passes import readers_of


@dataclass(slots=True)
class _Life:
    """Codes of a value: of the operations from `first` to `last`. `matrix`: one that multiplies them."""

    first: int
    last: int
    matrix: Fp8
    codes: Codes | None = None


class ActivationCodes:
    """Plan of the codes of a program's activations, and their memory.

    `gate_of`: the gated activation right behind a product that alone reads it, or None.
    """

    def __init__(
        self,
        memory: Memory,
        matrices: Mapping[Weight, Packed],
        gate_of: Callable[[ops.Linear], ops.GatedAct | None],
        batch_invariant: bool = False,
    ) -> None:
        self._memory, self._ops, self._invariant = memory, memory.program.ops, batch_invariant
        self._readers, self._at = readers_of(self._ops), {id(op): i for i, op in enumerate(self._ops)}
        self._matrices = {
            id(op): packed
            for op in self._ops
            if isinstance(op, ops.Linear) and isinstance(packed := matrices.get(op.weight), Fp8)
        }
        self._results = {value.buffer for value in memory.program.outputs.values()}
        self._lives: dict[int, _Life] = {}  # by the id of the product
        self._stored: dict[int, _Life] = {}  # by the id of the operation that stores the codes
        self._raw: dict[int, ops.Linear] = {}  # by the id of the operation that multiplies by the scales
        for op in self._ops:
            self._look(op)
        for op in self._ops:
            if isinstance(op, ops.Linear) and id(op) in self._lives and (reader := self._rescales(op, gate_of)):
                self._raw[id(reader)] = op
                self._lives[id(op)].last = max(self._lives[id(op)].last, self._at[id(reader)])
        self.nbytes = self._give_rooms()

    def attach(self, op: ops.Linear, product: object) -> None:
        """Set where an FP8 product finds codes, and what the kernels beside it do."""
        if isinstance(product, Fp8Product) and (life := self._lives.get(id(op))):
            product.codes, product.given = life.codes, any(life is stored for stored in self._stored.values())
            product.leaves = any(op is left for left in self._raw.values())

    # ---- the plan ----

    def _look(self, op: Op) -> None:
        """Note the codes that an operation stores for the products that read it, or that a product itself makes."""
        if isinstance(op, ops.Linear) and id(op) in self._matrices and id(op) not in self._lives:
            at = self._at[id(op)]
            self._lives[id(op)] = _Life(at, at, self._matrices[id(op)])
        if not isinstance(op, ops.Norm | ops.GatedAct) or (isinstance(op, ops.Norm) and op.head_dim):
            return
        readers = self._readers.get(op.out.buffer, [])
        found = [self._matrices.get(id(reader)) for reader in readers]
        first = found[0] if found and op.out.buffer not in self._results else None
        if first is None or not all(isinstance(r, ops.Linear) and r.x.whole for r in readers):
            return
        if any(m is None or (m.scales, m.input_scale) != (first.scales, first.input_scale) for m in found):
            return
        life = _Life(self._at[id(op)], self._at[id(readers[-1])], first)
        self._stored[id(op)] = life
        self._lives.update({id(reader): life for reader in readers})

    def _rescales(
        self, op: ops.Linear, gate_of: Callable[[ops.Linear], ops.GatedAct | None]
    ) -> ops.AddNorm | ops.GatedAct | None:
        """Return the operation that can multiply by the scales of a product, or None."""
        readers = self._readers.get(op.out.buffer, [])
        if op.bias is not None or self._matrices[id(op)].blocked or not readers or op.out.buffer in self._results:
            return None
        reader = readers[0]
        if isinstance(reader, ops.GatedAct):
            stored = self._stored.get(id(reader))
            return reader if stored and not stored.matrix.blocked and gate_of(op) is reader else None
        if len(readers) > 1 or not isinstance(reader, ops.AddNorm) or reader.head_dim or id(reader) in self._raw:
            return None
        return reader if op.out.whole else None

    def _give_rooms(self) -> int:
        """Give each value's codes memory that no other has meanwhile; return the bytes of all."""
        rooms: dict[tuple[int, Scales, float | None], list[tuple[int, Codes]]] = {}
        total, lives = 0, {id(life): life for life in self._lives.values()}
        for life in sorted(lives.values(), key=lambda life: life.first):
            kind = life.matrix.codes.shape[1], life.matrix.scales, life.matrix.input_scale
            free = rooms.setdefault(kind, [])
            at = next((i for i, (last, _) in enumerate(free) if last < life.first), len(free))
            if at == len(free):
                made = life.matrix.codes_for(max(self._memory.rows.values()))
                total += made.codes.nbytes + made.scale.nbytes
                free.append((life.last, made))
            life.codes = free[at][1]
            free[at] = life.last, life.codes
        return total

    # ---- launches ----

    def norm(self, op: ops.Norm, plain: Run, weight: Tensor | None, bias: Tensor | None) -> Run:
        """Return the launch of a norm. `plain`: without any codes, for the rows whose products read none."""
        life, raw = self._stored.get(id(op)), self._raw.get(id(op))
        if life is None and raw is None:
            return plain
        x, out = self._memory.value(op.x), self._memory.value(op.out)
        both, y, total = isinstance(op, ops.AddNorm), x, out
        if isinstance(op, ops.AddNorm):
            y, total = self._memory.value(op.y), self._memory.value(op.total)
            if raw is not None and raw.out.buffer == op.x.buffer:
                x, y = y, x
        product, width, launch = self._product(raw), op.out.width, Site(norm_codes)
        codes, scales = self._target(life, out)
        by_rows, by_columns = (codes[1], codes[1]) if product is None else product.raw_scales
        reader = self._product(self._reader(op))

        def run(n: Sizes) -> None:
            rows = n.of(op.out)
            unscaled = product is not None and product.raw(rows)
            stores = reader is not None and reader.reads_codes(rows)
            if not (unscaled or stores):
                plain(n)
                return
            launch(
                (rows,),
                x, y, by_rows, by_columns, x if weight is None else weight, x if bias is None else bias, total, out,
                *codes, x.stride(0), y.stride(0), op.eps, scale_stride(rows), WIDTH=width,
                BLOCK=max(BLOCK, power(width)), KP=-(-width // BLOCK) * BLOCK, ADD=both,
                RAW=unscaled, CENTER=op.center, WEIGHT=weight is not None, BIAS=bias is not None, KEEP=not stores,
                SCALES=scales if stores else "", PDL=n.early, num_warps=row_warps(width), **ahead(n.early),
            )  # fmt: skip

        return run

    def stores(self, op: ops.Norm) -> Callable[[int], bool]:
        """Return the function that is true for numbers of rows for which a norm stores codes."""
        reader = self._product(self._reader(op))
        return lambda rows: reader is not None and reader.reads_codes(rows)

    def gated(self, op: ops.GatedAct, plain: Run, applied: Callable[[int], bool]) -> Run:
        """Return the launch of a gated activation; see `norm`.

        `applied`: returns True if the product before applies it to so many rows. Only codes of its result are to be
        stored then.
        """
        life, raw = self._stored.get(id(op)), self._raw.get(id(op))
        reads, product = self._product(self._reader(op)), self._product(raw, op.act)
        if life is None or reads is None:
            return plain
        gate, up, out = self._memory.value(op.gate), self._memory.value(op.up), self._memory.value(op.out)
        width, launch, half = op.out.width, Site(gate_codes), self._memory.dtype == torch.float16
        quantize = Site(quantize_rows)
        codes, scales = self._target(life, gate)
        by_rows, by_columns = (codes[1], codes[1]) if product is None else product.raw_scales

        def run(n: Sizes) -> None:
            rows = n.of(op.out)
            if not reads.reads_codes(rows):
                plain(n)
                return
            if applied(rows):
                quantize(
                    (rows,),
                    out, *codes, out.stride(0), scale_stride(rows), WIDTH=width, KP=-(-width // BLOCK) * BLOCK,
                    BLOCK=max(BLOCK, power(width)), SCALES=scales, PDL=n.early, num_warps=row_warps(width),
                    **ahead(n.early),
                )  # fmt: skip
                return
            launch(
                (rows,),
                gate, up, by_rows, by_columns, *codes, gate.stride(0), up.stride(0), scale_stride(rows), WIDTH=width,
                KP=-(-width // BLOCK) * BLOCK, BLOCK=max(BLOCK, power(width)),
                RAW=product is not None and product.raw(rows), ACT=op.act, HALF=half, SCALES=scales, PDL=n.early,
                num_warps=row_warps(width), **ahead(n.early),
            )  # fmt: skip

        return run

    def _reader(self, op: Op) -> ops.Linear | None:
        """Return a product that reads the codes that an operation stores."""
        reader = next(iter(self._readers.get(op.out.buffer, [])), None)
        return reader if isinstance(reader, ops.Linear) and id(op) in self._stored else None

    def _product(self, op: ops.Linear | None, act: str = "") -> Fp8Product | None:
        """Return a product, for its decisions and scales. `act`: as of `Operands`."""
        if op is None:
            return None
        memory = self._memory
        operands = Operands(memory.value(op.x), memory.value(op.out), act=act)
        product = self._matrices[id(op)].product(operands, None, self._invariant)
        self.attach(op, product)
        return product

    @staticmethod
    def _target(life: _Life | None, other: Tensor) -> tuple[tuple[Tensor, Tensor], Scales | str]:
        """Return where codes and their scales are stored, and SCALES of the kernel; `other` and "" for none."""
        if life is None or life.codes is None:
            return (other, other), ""
        return life.codes, life.matrix.scales
