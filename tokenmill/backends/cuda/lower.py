"""Lowering of a program to a list of launches with fixed addresses: made once, run for every step or captured.

A launch takes the step's sizes and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from tokenmill.backends.cuda.attention import AttentionLowering, AttentionOptions
from tokenmill.backends.cuda.collectives.base import Collectives
from tokenmill.backends.cuda.encoded_attention import EncodedLowering
from tokenmill.backends.cuda.experts import LAUNCHES, ExpertLowering
from tokenmill.backends.cuda.kernels import rows as kernels
from tokenmill.backends.cuda.latent import LatentLowering
from tokenmill.backends.cuda.launch import Launch, Run, Site, ahead
from tokenmill.backends.cuda.memory import Memory
from tokenmill.backends.cuda.pack import DeviceWeights
from tokenmill.backends.cuda.products.base import Needs, Operands, Product, Scratch
from tokenmill.backends.cuda.products.dense import largest
from tokenmill.backends.cuda.quantized import ActivationCodes
from tokenmill.backends.cuda.rank_ops import RankLowering
from tokenmill.backends.cuda.recurrence import StateLowering
from tokenmill.backends.cuda.row_ops import RowLowering
from tokenmill.backends.cuda.shapes import power
from tokenmill.backends.cuda.sizes import Sizes
from tokenmill.backends.cuda.slots import CudaSlots
from tokenmill.backends.cuda.states import CudaStates
from tokenmill.program import ops, special
from tokenmill.program.ops import Op, Weight
from tokenmill.program.passes import readers_of

_BLOCK = 1024
_ACTS: dict[str, Callable[..., Tensor]] = {
    "silu": torch.nn.functional.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "linear": lambda x: x,
    "sigmoid": torch.sigmoid,
    "relu": torch.nn.functional.relu,
    "relu2": lambda x: torch.nn.functional.relu(x).square(),
    "gelu": torch.nn.functional.gelu,
}


class Lowering:
    """Lowers a prepared program. The cache must be allocated before `launches`. `collectives`: None for one rank."""

    def __init__(
        self,
        memory: Memory,
        weights: DeviceWeights,
        slots: CudaSlots,
        states: CudaStates,
        options: AttentionOptions | None = None,
        collectives: Collectives | None = None,
    ) -> None:
        options = options or AttentionOptions()
        self._memory, self._weights, self._slots, self._invariant = memory, weights, slots, options.batch_invariant
        self._rank = options.rank
        self._attention = AttentionLowering(memory, weights.tensors, slots, options)
        self._encoded = EncodedLowering(memory, weights.tensors, slots, options)
        self._latent = LatentLowering(memory, weights.tensors, slots, options)
        self.mixtures = ExpertLowering(memory, weights, options.batch_invariant, options.rank)
        self._states = StateLowering(memory, weights.tensors, states, batch_invariant=options.batch_invariant)
        self._made = {v.buffer: op for op in memory.program.ops for v in op.results().values()}
        self._readers = readers_of(memory.program.ops)
        fast = memory.dtype.itemsize == 2 or not memory.device.real  # tiles of float32 do not fit
        outputs = largest(*(op.out.width for op in memory.program.ops if isinstance(op, ops.Linear)))
        self._scratch = Scratch(outputs, memory.device.torch, self._needs(), memory.dtype) if fast else None
        self._codes = ActivationCodes(memory, weights.matrices, self.gate_of, options.batch_invariant)
        self._ranks = None
        if collectives is not None:
            self._ranks = RankLowering(memory, weights.tensors, collectives, self._codes.stores)

    def _needs(self) -> Needs:
        """Return the scratch memory that serves each product in turn."""
        products = [op for op in self._memory.program.ops if isinstance(op, ops.Linear)]
        found = [self._weights.matrices[op.weight].needs(self._memory.rows[op.x.spec.rows]) for op in products]
        return Needs(*(max(sizes) for sizes in zip(*found, strict=True))) if found else Needs()

    @property
    def tile_tokens(self) -> set[int]:
        """The most tokens of a tile, for every kind of attention and of state in the program."""
        return self._attention.tile_tokens | self._states.tile_tokens | self._encoded.tile_tokens

    @property
    def expands(self) -> tuple[int, int] | None:
        """See `LatentLowering`."""
        return self._latent.expands

    @property
    def nbytes(self) -> int:
        """Bytes of scratch."""
        split = 0 if self._scratch is None else self._scratch.nbytes
        others = self._latent.nbytes + self.mixtures.nbytes + self._states.nbytes + self._codes.nbytes
        return self._attention.nbytes + self._encoded.nbytes + others + split

    @property
    def num_launches(self) -> int:
        """Number of kernels that a captured step launches at most, the sampler's not included."""
        captured = [op for op in self._memory.program.ops if op.out.spec.rows != "inputs"]
        return sum(LAUNCHES if isinstance(op, ops.Experts) else 1 for op in captured)

    def launches(self) -> list[Launch]:
        """Return the launches in the order of the program."""
        return [Launch(op, self._lower(op)) for op in self._memory.program.ops]

    def _lower(self, op: Op) -> Run:
        if isinstance(op, ops.Attention):
            return self._attention.lower(op)
        lowered: dict[type[Op], Callable[[Any], Run]] = {
            ops.Embed: self._embed,
            ops.Linear: self._linear,
            ops.Norm: self._norm,
            ops.AddNorm: self._norm,
            ops.GatedAct: self._gated,
            ops.Act: self._act,
            ops.Add: self._add,
            ops.Scale: self._scale,
            ops.SoftCap: self._soft_cap,
            ops.TakeRows: self._take,
            ops.LatentAttention: self._latent.lower,
            ops.Route: self.mixtures.route,
            ops.Experts: self.mixtures.experts,
            **RowLowering(self._memory, self._weights.tensors).by_kind(),
            **self._states.by_kind(),
            **({} if self._ranks is None else self._ranks.by_kind()),
            **self._encoded.by_kind(),
        }
        return lowered[type(op)](op)

    def weight(self, weight: Weight) -> Tensor:
        """Return a vector or a table on the device."""
        return self._weights.tensors[weight]

    def _optional(self, weight: Weight | None) -> Tensor | None:
        return None if weight is None else self.weight(weight)

    def _embed(self, op: ops.Embed) -> Run:
        table, out, tokens = self.weight(op.table), self._memory.value(op.out), self._slots.tokens
        width, by_position = op.out.width, op.ids.buffer == self._memory.program.inputs.positions.buffer
        within, launch = self._made.get(op.ids.buffer), Site(kernels.embed_rows)
        most = within.rows if isinstance(within, special.Within) else 0
        part = op.table.rows if op.table.ranks > 1 and op.table.shard == "vocab" else 0  # rows that this rank has

        def run(n: Sizes) -> None:
            launch(
                (n.tokens,),
                n.pairs, tokens, table, out, tokens.stride(0), op.scale, most, self._rank * part, WIDTH=width,
                BLOCK=min(power(width), 4096), BY_POSITION=by_position, BOUND=most > 0, PART=part, num_warps=4,
            )  # fmt: skip

        return run

    def product(self, op: ops.Linear) -> Product:
        """Return the kernels of a product, with the gated activation behind it if there is one."""
        gate = self.gate_of(op)
        operands = Operands(self._memory.value(op.x), self._memory.value(op.out), self._optional(op.bias))
        if gate is not None:
            operands = operands._replace(act=gate.act, gated=self._memory.value(gate.out))
        product = self._weights.matrices[op.weight].product(operands, self._scratch, self._invariant)
        self._codes.attach(op, product)
        return product

    def gate_of(self, op: ops.Linear) -> ops.GatedAct | None:
        """Return the activation right behind a product that alone reads its halves, or None."""
        readers = self._readers.get(op.out.buffer, [])
        first = readers[0] if readers else None
        if not isinstance(first, ops.GatedAct) or any(reader is not first for reader in readers):
            return None
        at = self._memory.program.ops.index(op)
        halves = first.gate.start == 0 and first.up.start == first.gate.width == op.out.width // 2
        return first if halves and self._memory.program.ops[at + 1] is first else None

    def _linear(self, op: ops.Linear) -> Run:
        if op.gated or op.act or op.residual:
            raise NotImplementedError("a fusion that prepare.py does not make")
        product = self.product(op)

        def run(n: Sizes) -> None:
            product.run(n.of(op.out), n.early)

        return run

    def _norm(self, op: ops.Norm) -> Run:
        if op.head_dim:
            return self._norm_heads(op)
        x, out, weight = self._memory.value(op.x), self._memory.value(op.out), self._optional(op.weight)
        both = isinstance(op, ops.AddNorm)
        y, total = (self._memory.value(op.y), self._memory.value(op.total)) if isinstance(op, ops.AddNorm) else (x, out)
        bias, width, launch = self._optional(op.bias), op.out.width, Site(kernels.norm_rows)

        def run(n: Sizes) -> None:
            launch(
                (n.of(op.out),),
                x, y, x if weight is None else weight, x if bias is None else bias, total, out, x.stride(0),
                y.stride(0), op.eps, WIDTH=width, BLOCK=power(width), ADD=both, CENTER=op.center,
                WEIGHT=weight is not None, BIAS=bias is not None, PDL=n.early, num_warps=4 if width <= 2048 else 8,
                **ahead(n.early),
            )  # fmt: skip

        alone = self._codes.norm(op, run, weight, bias)
        return alone if self._ranks is None else self._ranks.norm(op, alone)

    def _norm_heads(self, op: ops.Norm) -> Run:
        x, out, weight, bias = (
            self._memory.value(op.x), self._memory.value(op.out), self._optional(op.weight), self._optional(op.bias)
        )  # fmt: skip
        heads, launch = op.out.width // op.head_dim, Site(kernels.norm_heads)
        steps = [0 if each is None or len(each) == op.head_dim else op.head_dim for each in (weight, bias)]

        def run(n: Sizes) -> None:
            launch(
                (n.of(op.out), heads),
                x, x if weight is None else weight, x if bias is None else bias, out, x.stride(0), *steps, op.eps,
                HEADS=heads, D=op.head_dim, BLOCK=power(op.head_dim), CENTER=op.center, WEIGHT=weight is not None,
                BIAS=bias is not None, num_warps=1,
            )  # fmt: skip

        return run

    def _gated(self, op: ops.GatedAct) -> Run:
        gate, up, out = (self._memory.value(v) for v in (op.gate, op.up, op.out))
        width, columns, launch = op.out.width, triton.cdiv(op.out.width, _BLOCK), Site(kernels.gate_rows)
        made = self._made.get(op.gate.buffer)
        product = self.product(made) if isinstance(made, ops.Linear) and self.gate_of(made) is op else None

        def applied(rows: int) -> bool:
            return product is not None and product.applies_act(rows)

        def run(n: Sizes) -> None:
            if applied(n.of(op.out)):
                return  # done with the product
            launch(
                (n.of(op.out), columns),
                gate, up, out, gate.stride(0), up.stride(0), WIDTH=width, BLOCK=_BLOCK,
                ACT=op.act, num_warps=4,
            )  # fmt: skip

        return self._codes.gated(op, run, applied)

    def _act(self, op: ops.Act) -> Run:
        x, out, act = self._memory.value(op.x), self._memory.value(op.out), _ACTS.get(op.act, _gelu_tanh)

        def run(n: Sizes) -> None:
            rows = n.of(op.out)
            out[:rows].copy_(act(x[:rows]))

        return run

    def _add(self, op: ops.Add) -> Run:
        x, y, out = (self._memory.value(v) for v in (op.x, op.y, op.out))

        def run(n: Sizes) -> None:
            rows = n.of(op.out)
            torch.add(x[:rows], y[:rows], out=out[:rows])

        return run

    def _scale(self, op: ops.Scale) -> Run:
        x, out = self._memory.value(op.x), self._memory.value(op.out)

        def run(n: Sizes) -> None:
            rows = n.of(op.out)
            torch.mul(x[:rows], op.factor, out=out[:rows])

        return run

    def _soft_cap(self, op: ops.SoftCap) -> Run:
        x, out = self._memory.value(op.x), self._memory.value(op.out)

        def run(n: Sizes) -> None:
            rows = n.of(op.out)
            out[:rows].copy_(torch.tanh(x[:rows].float() / op.cap) * op.cap)

        return run

    def _take(self, op: ops.TakeRows) -> Run:
        x, out, width = self._memory.value(op.x), self._memory.value(op.out), op.out.width
        columns, launch = triton.cdiv(width, _BLOCK), Site(kernels.take_rows)

        def run(n: Sizes) -> None:
            if n.sampling:
                launch(
                    (n.sampling, columns),
                    x, n.pairs if n.samples is None else n.samples, out, x.stride(0), WIDTH=width, BLOCK=_BLOCK,
                    SOME=n.samples is not None, num_warps=4,
                )  # fmt: skip

        return run


def _gelu_tanh(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")
