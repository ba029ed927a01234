"""Memory of a step's values and of the cache. Invariant: addresses never change, for captured graphs hold them."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmill.backends.base import StepLimits
from tokenmill.backends.cuda.device import Device
from tokenmill.backends.steps import block_bytes, cache_plan, most_rows, one_table
from tokenmill.program import ops, special
from tokenmill.program.buffers import plan_buffers
from tokenmill.program.cost import cache_layout
from tokenmill.program.encoded import encodes
from tokenmill.program.rope import RopeTable
from tokenmill.program.value import Buffer, Program, Value


class Memory:
    """Values of a program at its largest step, and its cache.

    `cache_dtype`: None for the computation's. `windows`: False if kernels may read blocks before a window, which then
    keep their content.
    """

    def __init__(
        self,
        program: Program,
        limits: StepLimits,
        dtype: torch.dtype,
        device: Device,
        cache_dtype: torch.dtype | None = None,
        windows: bool = True,
    ) -> None:
        self.program, self.limits, self.dtype, self.device = program, limits, dtype, device
        self.cache_dtype = cache_dtype or dtype
        self._exact = moments_of(program)
        self.rows = most_rows(limits)
        # Of an encoder several inputs run at once, as many tokens as a step may have.
        self.rows["inputs"] = max(self.rows["inputs"], self.rows["tokens"]) if encodes(program) else 0
        first = next((i for i, op in enumerate(program.ops) if isinstance(op, ops.TakeRows)), len(program.ops))
        lasting = {v.buffer for op in program.ops[first:] for v in op.reads().values()}
        lasting &= {v.buffer for op in program.ops[:first] for v in op.results().values()}
        # A product may write the output of the next operation, and read the input of the norm before.
        # A norm may sum the ranks' results itself, and read the input of that sum.
        late = ops.Linear | ops.Norm | ops.Experts | ops.AllReduce
        self._plan = plan_buffers(program, self._bytes, lambda op: isinstance(op, late), lasting)
        self._arena = torch.empty(self._plan.size, dtype=torch.uint8, device=device.torch)
        self._buffers: dict[int, Tensor] = {}
        layout = cache_layout(program)
        self.cache_plan = cache_plan(layout, limits.max_total_tokens) if windows else one_table(layout)
        self._cache: dict[int, Tensor] = {}
        self._cos_sin_of: dict[tuple[RopeTable, int], tuple[Tensor, Tensor]] = {}
        queries = max((op.q.width for op in program.ops if isinstance(op, ops.Attention)), default=0)
        self.queries = torch.empty(self.rows["tokens"], queries, dtype=dtype, device=device.torch)

    def _bytes(self, buffer: Buffer) -> int:
        return self.rows[buffer.rows] * buffer.width * self._dtype(buffer).itemsize

    def _dtype(self, buffer: Buffer) -> torch.dtype:
        if buffer.id in self._exact:
            return torch.float32
        return torch.int32 if buffer.dtype == "ids" else self.dtype

    @property
    def coded(self) -> bool:
        """True if the cache holds 8-bit codes."""
        return self.cache_dtype.itemsize == 1

    @property
    def step_bytes(self) -> int:
        """Bytes of values and of rotated queries."""
        return self._plan.size + self.queries.nbytes

    def value(self, v: Value) -> Tensor:
        """Return a value's rows at the largest step; a smaller step uses the first of them."""
        if v.buffer not in self._buffers:
            start, size = self._plan.offsets[v.buffer], self._bytes(v.spec)
            flat = self._arena[start : start + size].view(self._dtype(v.spec))
            self._buffers[v.buffer] = flat.view(self.rows[v.spec.rows], v.spec.width)
        whole = self._buffers[v.buffer]
        return whole if v.whole else whole[:, v.start : v.start + v.width]

    def cos_sin(self, table: RopeTable, head_dim: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (positions, half a head), float32: 1 and 0 for columns that are not rotated."""
        if (table, head_dim) not in self._cos_sin_of:
            positions = torch.arange(self.limits.max_total_tokens + 1)
            if table.moves:
                inverse = torch.from_numpy(table.frequencies_at(positions.numpy()))
            else:
                inverse = torch.from_numpy(table.inverse_frequencies())[None]
            angle = positions.to(self.device.torch)[:, None].float() * inverse.to(self.device.torch)
            rest = 0, (head_dim - table.rotary_dim) // 2
            self._cos_sin_of[table, head_dim] = (
                torch.nn.functional.pad(angle.cos() * table.magnitude(), rest, value=1.0),
                torch.nn.functional.pad(angle.sin() * table.magnitude(), rest),
            )
        return self._cos_sin_of[table, head_dim]

    def rotations(self) -> list[Tensor]:
        """Return the cosines and sines of all operations that rotate, each tensor once."""
        rotating = [op for op in self.program.ops if isinstance(op, ops.Attention | ops.LatentAttention | ops.Rope)]
        columns = [op.key.width if isinstance(op, ops.LatentAttention) else op.head_dim for op in rotating]
        tables = {(op.rope, n) for op, n in zip(rotating, columns, strict=True) if op.rope is not None}
        return [part for table in tables for part in self.cos_sin(*table)]

    def block_bytes(self) -> int:
        """Bytes of one cache block."""
        return block_bytes(self.cache_plan, self.cache_dtype.itemsize, self.limits.block_size)

    def allocate(self, num_blocks: int) -> None:
        """Make the cache, with a padding block behind the last one."""
        parts = []
        for spec in self.cache_plan.parts:
            halves = 2 if [part.name for part in spec.parts] == ["key", "value"] else 1
            shape = halves, (num_blocks + 1) * self.limits.block_size, spec.width // halves
            parts.append(torch.zeros(shape, dtype=self.cache_dtype, device=self.device.torch))
        self._cache = {layer: parts[part] for layer, (_, part) in self.cache_plan.places.items()}

    def cache(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return keys and values (places, heads · head size)."""
        keys, values = self._cache[layer].unbind(0)
        return keys, values

    def rows_of(self, layer: int) -> Tensor:
        """Return the compressed rows (places, width) of a layer that has these instead of keys and values."""
        (rows,) = self._cache[layer].unbind(0)
        return rows

    def clear(self, num_blocks: int) -> None:
        """Clear the first blocks and the padding block."""
        size = self.limits.block_size
        for cache in self._cache.values():
            cache[:, : num_blocks * size].zero_()
            cache[:, -size:].zero_()


def moments_of(program: Program) -> set[int]:
    """Return the buffers that are float32 whatever the computation's dtype: moments, and their sums over ranks."""
    own = {op.out.buffer for op in program.ops if isinstance(op, special.Moments)}
    summed = (op for op in program.ops if isinstance(op, ops.AllReduce) and op.x.buffer in own)
    return own | {op.out.buffer for op in summed}


def free_bytes(device: str) -> tuple[int, int]:
    """Return a CUDA device's free bytes and all its bytes."""
    free, total = torch.cuda.mem_get_info(device)
    return int(free), int(total)
