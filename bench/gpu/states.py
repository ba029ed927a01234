"""Time layers with a state: decode of 1, 64 and 256 rows, prefill of 8,192 tokens, variants of tile sizes side by side.

    python -m bench.gpu.states [--only mamba2,delta]

Each variant is compared with torch in float32. Beside each figure is its floor, bytes at 4 TB/s, and the time of each
kernel.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.gpu.floor import BYTES_S
from bench.gpu.timing import graph_us, median_us, off
from tokenmill.backends.base import StepInputs, StepLimits
from tokenmill.backends.cuda.device import Device
from tokenmill.backends.cuda.launch import Site
from tokenmill.backends.cuda.memory import Memory
from tokenmill.backends.cuda.recurrence import StateLowering
from tokenmill.backends.cuda.sizes import Sizes, StepArrays
from tokenmill.backends.cuda.states import SHAPES, CudaStates, StateShapes
from tokenmill.backends.torch import recurrence as reference
from tokenmill.backends.torch.states import States
from tokenmill.program import ops
from tokenmill.program.cost import state_layout, weights_of
from tokenmill.program.ops import Op, Part, Weight
from tokenmill.program.recurrence import CausalConv, DeltaRule, RgLru, StateSpace
from tokenmill.program.value import Inputs, Value, record

BYTES_US = BYTES_S / 1e6
BATCHES = (1, 64, 256)
PROMPT = 8192


class Shape:
    """A layer with random weights."""

    def __init__(self) -> None:
        self.count = 0

    def weight(self, rows: int, columns: int = 0) -> Weight:
        self.count += 1
        return Weight((Part(f"w{self.count}", rows),), columns)

    def inputs(self, inputs: Inputs, *widths: int) -> list[Value]:
        """Return parts of one product, as a model has them."""
        total = sum(widths)
        x = inputs.ids.record(ops.Linear, total, x=inputs.ids, weight=self.weight(total, 1))
        return x.split(*widths)

    def conv(self, i: Inputs, width: int, taps: int) -> Value:
        x, _ = self.inputs(i, width, 128)
        fields: dict[str, Any] = {"weight": self.weight(width, taps), "bias": self.weight(width), "act": "silu"}
        return x.record(CausalConv, x=x, layer=0, **fields)

    def space(self, i: Inputs, heads: int, width: int, columns: int, groups: int, each: bool = False) -> Value:
        x, b, c, dt = self.inputs(i, heads * width, groups * columns, groups * columns, heads)
        return x.record(
            StateSpace, x=x, dt=dt, b=b, c=c, a_log=self.weight(heads, columns if each else 0), d=self.weight(heads),
            dt_bias=self.weight(heads), groups=groups, layer=0,
        )  # fmt: skip

    def delta(self, i: Inputs, heads: int, keys: int, columns: int, width: int, each: bool = False) -> Value:
        decays = heads * columns if each else heads
        q, k, v, a, b = self.inputs(i, keys * columns, keys * columns, heads * width, decays, heads)
        return v.record(
            DeltaRule, q=q, k=k, v=v, a=a, b=b, a_log=self.weight(heads), dt_bias=self.weight(decays),
            head_dim=columns, layer=0,
        )  # fmt: skip

    def lru(self, i: Inputs, heads: int, columns: int) -> Value:
        (x,) = self.inputs(i, heads * columns)

        def gate() -> tuple[Weight, ...]:
            return tuple(self.weight(columns, columns) for _ in range(heads))

        return x.record(
            RgLru, x=x, input_gate=gate(), input_bias=self.weight(heads, columns), recurrence_gate=gate(),
            recurrence_bias=self.weight(heads, columns), a=self.weight(heads * columns), layer=0,
        )  # fmt: skip


Make = Callable[[Shape, Inputs], Value]
LAYERS: dict[str, Make] = {
    "mamba2": lambda s, i: s.space(i, 128, 64, 128, 1),  # Bamba 9B
    "delta": lambda s, i: s.delta(i, 32, 16, 128, 128),  # Qwen 3 Next
    "kda": lambda s, i: s.delta(i, 32, 32, 128, 128, True),  # Kimi Linear
    "mamba2_n256": lambda s, i: s.space(i, 24, 64, 256, 1),  # Falcon-H1 1.5B
    "mamba": lambda s, i: s.space(i, 8192, 1, 16, 1, True),  # Falcon Mamba 7B
    "lru": lambda s, i: s.lru(i, 10, 256),  # RecurrentGemma 2B
    "conv": lambda s, i: s.conv(i, 8448, 4),  # Bamba 9B
}
_REFERENCES: dict[type[Op], Any] = {
    CausalConv: reference.causal_conv, StateSpace: reference.state_space, DeltaRule: reference.delta_rule,
    RgLru: reference.rg_lru,
}  # fmt: skip


class Layer:
    """One operation with a state, on the device, with room for `rows` sequences."""

    def __init__(
        self,
        name: str,
        max_tokens: int,
        rows: int,
        shapes: StateShapes = SHAPES,
        device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        shape = Shape()
        self.program = record(lambda inputs: LAYERS[name](shape, inputs))
        self.op = self.program.ops[-1]
        self.device, self.limits = Device(device), StepLimits(max_tokens, rows, max_tokens, 16)
        self.memory = Memory(self.program, self.limits, dtype, self.device)
        self.layout = state_layout(self.program)
        self.states = CudaStates(self.layout, rows + 1, dtype, self.device)
        self.weights = {weight: self._drawn(weight) for weight in weights_of(self.program)}
        lowering = StateLowering(self.memory, self.weights, self.states, shapes)
        self.run = lowering.by_kind()[type(self.op)](self.op)
        self.arrays = StepArrays(self.limits, self.device, rows, lowering.tile_tokens)
        for value in self.reads():
            value.normal_()

    def _drawn(self, weight: Weight) -> Tensor:
        shape = (weight.rows, weight.columns) if weight.columns else (weight.rows,)
        drawn = torch.randn(shape, device=self.device.torch) * (0.06 if weight.columns > 16 else 0.5)
        return drawn.to(self.memory.dtype)

    def reads(self) -> list[Tensor]:
        return [self.memory.value(v) for v in self.op.reads().values()]

    def decode(self, rows: int, position: int) -> Sizes:
        slots = np.arange(rows, dtype=np.int32)
        return self.arrays.decode(slots, np.full(rows, position, np.int32), rows)

    def prompts(self, *counts: int, starts: tuple[int, ...] = ()) -> tuple[Sizes, StepInputs]:
        slots = np.arange(len(counts), dtype=np.int32)
        begun = np.array(starts or [0] * len(counts), np.int32)
        inputs = StepInputs(slots, begun, np.array(counts, np.int32), slots)
        return self.arrays.mixed(inputs), inputs

    def errors(self) -> Iterator[float]:
        """Yield the relative error of outputs and states against torch in float32, over runs and single tokens."""
        states = States(self.layout, self.limits.max_batch_size, torch.float32, self.device.torch)
        states.allocate()
        weights = {weight: tensor.float() for weight, tensor in self.weights.items()}
        for counts, starts in (((301, 70, 2), ()), ((1, 1, 1), (301, 70, 2)), ((2, 1, 130), (302, 71, 3))):
            sizes, inputs = self.prompts(*counts, starts=starts)
            for value in self.reads():
                value.normal_()
            self.run(sizes)
            plan = states.plan(inputs)
            values = [value[: sum(counts)].float() for value in self.reads()]
            want = _REFERENCES[type(self.op)](self.op, plan, weights, *values)
            if isinstance(self.op, CausalConv):
                want = torch.nn.functional.silu(want)
            yield off(self.memory.value(self.op.out)[: sum(counts)], want)
            spec = self.op.state()
            assert spec is not None
            ends = torch.from_numpy((inputs.starts + inputs.counts) % 2).to(self.device.torch)
            slots = torch.arange(len(counts), device=self.device.torch)
            yield off(self.states.ring(spec)[slots, ends], plan.rings[spec.key][slots, ends])

    def row_bytes(self, tokens: int, rows: int) -> float:
        """Return the bytes that must move: values once, states once each way."""
        spec = self.op.state()
        assert spec is not None
        item = 4 if spec.dtype == "float32" else 2
        width = sum(v.width for v in self.op.reads().values()) + self.op.out.width
        return tokens * width * 2.0 + 2.0 * rows * math.prod(spec.shape) * item


def parts_us(run: Callable[[], None], rounds: int = 5) -> str:
    """Return the median time of each kernel of a call."""
    events: dict[str, list[tuple[Any, Any]]] = {}
    own = Site.__call__

    def timed(site: Site, *arguments: Any, **constants: Any) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        own(site, *arguments, **constants)
        end.record()
        events.setdefault(site._kernel.__name__, []).append((start, end))

    Site.__call__ = timed  # type: ignore[method-assign]
    try:
        for _ in range(rounds):
            run()
    finally:
        Site.__call__ = own  # type: ignore[method-assign]
    torch.cuda.synchronize()
    medians = {name: np.median([s.elapsed_time(e) * 1e3 for s, e in pairs]) for name, pairs in events.items()}
    return ", ".join(f"{name} {median:.0f}" for name, median in medians.items())


DECODES: dict[str, list[StateShapes]] = {
    "mamba2": [SHAPES, StateShapes(tile=4096)],
    "mamba2_n256": [SHAPES, StateShapes(tile=4096)],
    "delta": [SHAPES, StateShapes(tile=16384), StateShapes(tile=16384, tile_warps=8)],
    "mamba": [SHAPES],
}
PREFILLS: dict[str, list[StateShapes]] = {
    "mamba2": [
        StateShapes(scan_columns=columns, scan_warps=warps, scan_stages=stages)
        for columns, warps, stages in ((64, 4, 2), (64, 4, 3), (32, 4, 2), (32, 4, 3))
    ],
    "delta": [
        SHAPES, StateShapes(ready_registers=168), StateShapes(ready_warps=8, ready_registers=128),
        StateShapes(delta_stages=2, delta_columns=16), StateShapes(delta_columns=64, delta_warps=8),
        StateShapes(delta_columns=64, delta_stages=2),
    ],
    "kda": [SHAPES, StateShapes(ready_warps=2)],
    "mamba2_n256": [SHAPES, StateShapes(scan_warps=8), StateShapes(scan_warps=8, scan_columns=128)],
    "mamba": [
        StateShapes(channels=channels, channel_chunk=chunk, channel_stages=stages)
        for channels, chunk, stages in ((16, 8, 3), (32, 4, 4), (16, 4, 4), (8, 8, 3), (32, 8, 3), (16, 16, 2))
    ],
    "lru": [SHAPES, StateShapes(lru_columns=32), StateShapes(lru_chunk=32), StateShapes(lru_chunk=128)],
}


def differs(shapes: StateShapes) -> str:
    """Return the fields that are not the default."""
    changed = [f"{name}={value}" for name, value in shapes._asdict().items() if value != getattr(SHAPES, name)]
    return ", ".join(changed) or "default"


def check(name: str, shapes: StateShapes) -> str:
    """Return the largest relative error."""
    worst = max(Layer(name, 1024, 4, shapes).errors())
    return f"{worst:.1e}" + ("" if worst < 2e-2 else " WRONG")


def compile_all(name: str) -> None:
    """Run every variant once."""
    for shapes in (*DECODES.get(name, ()), *PREFILLS.get(name, ()), SHAPES):
        check(name, shapes)
        layer = Layer(name, PROMPT, 8, shapes)
        layer.run(layer.prompts(PROMPT)[0])
        torch.cuda.synchronize()


def measure(name: str) -> Iterator[str]:
    """Yield lines of a layer: errors and figures by variant."""
    for shapes in DECODES.get(name) or [SHAPES]:
        cells = []
        layer = Layer(name, 1024, max(BATCHES), shapes)
        for rows in BATCHES:
            sizes = layer.decode(rows, 5)
            took = graph_us(lambda _, sizes=sizes, layer=layer: layer.run(sizes))  # type: ignore[misc]
            cells.append(f"{took:7.1f} ({layer.row_bytes(rows, rows) / BYTES_US:.1f})")
        del layer
        yield f"{name} decode {' '.join(cells)}  {differs(shapes)}, error {check(name, shapes)}"
    for shapes in PREFILLS.get(name) or [SHAPES]:
        wrong, cells = check(name, shapes), []
        layer = Layer(name, PROMPT, 8, shapes)
        for counts in ((PROMPT,), (PROMPT // 8,) * 8):
            sizes, _ = layer.prompts(*counts)
            layer.run(sizes)
            took = median_us(lambda sizes=sizes, layer=layer: layer.run(sizes))  # type: ignore[misc]
            parts = parts_us(lambda sizes=sizes, layer=layer: layer.run(sizes))  # type: ignore[misc]
            cells.append(f"{took:7.1f} ({layer.row_bytes(PROMPT, len(counts)) / BYTES_US:.1f}; {parts})")
        yield f"{name} prefill {' '.join(cells)}  {differs(shapes)}, error {wrong}"
        del layer


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(LAYERS))
    parser.add_argument("--here", choices=("compile", "measure"), help="what to do in this process")
    args = parser.parse_args(words)
    names = args.only.split(",")
    if args.here is None:  # A process for each layer, because an illegal access ends a process.
        command = [sys.executable, "-m", "bench.gpu.states", "--only"]
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        compiling = [subprocess.Popen([*command, name, "--here", "compile"], **quiet) for name in names]
        for process in compiling:
            process.wait()
        print("µs (floor): decode of 1, 64, 256 rows; prefill of 1 × 8192 and 8 × 1024 tokens", flush=True)
        for name in names:
            subprocess.run([*command, name, "--here", "measure"], check=False)
        return
    torch.manual_seed(0)
    with torch.inference_mode():
        for name in names:
            if args.here == "compile":
                compile_all(name)
                continue
            for line in measure(name):
                print(line, flush=True)


if __name__ == "__main__":
    main()
