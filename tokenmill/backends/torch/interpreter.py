"""Interpreter of a program with torch: a plain loop, which drops each value after its last reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenmill.backends.torch import kinds
from tokenmill.backends.torch.step_state import StepState
from tokenmill.errors import Unsupported
from tokenmill.program import ops
from tokenmill.program.buffers import last_uses
from tokenmill.program.ops import Op
from tokenmill.program.value import Program, Value

Env = dict[int, Tensor]
"""Buffer -> its value."""


@dataclass(frozen=True, slots=True)
class _Line:
    """One operation, resolved: its kernel, inputs, outputs, and the buffers to drop afterwards."""

    op: Op
    kernel: Callable[..., Any]
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    done: tuple[int, ...]


class Interpreter:
    """Runs one program in two parts, split at TakeRows; those of an encoder apart.

    The second part may run several times, over other rows of the same step. The constructor raises Unsupported for an
    operation without a kernel. `more`: kernels besides those of `kinds`.
    """

    def __init__(self, program: Program, more: Mapping[type[Op], Callable[..., Any]] | None = None) -> None:
        self.program = program
        first = next((i for i, op in enumerate(program.ops) if isinstance(op, ops.TakeRows)), len(program.ops))
        last = last_uses(program)
        kernels = kinds.kernels() | dict(more or {})
        lines: list[_Line] = []
        self._encoder: list[_Line] = []
        for i, op in enumerate(program.ops):
            if type(op) not in kernels:
                raise Unsupported("operation", type(op).__name__, [kind.__name__ for kind in kernels])
            reads, writes = tuple(op.reads().values()), tuple(op.results().values())
            gone = tuple({v.buffer for v in (*reads, *writes) if last[v.buffer] == i})
            line = _Line(op, kernels[type(op)], reads, writes, gone)
            (self._encoder if op.out.spec.rows == "inputs" else lines).append(line)
        first -= len(self._encoder)  # whose operations are the first ones
        self._body, self._tail = lines[:first], lines[first:]

    @torch.inference_mode()
    def encode(self, step: StepState) -> None:
        """Run the encoder for one input."""
        _run(self._encoder, step, {})

    @torch.inference_mode()
    def body(self, step: StepState, ids: Tensor) -> Env:
        """Run the first part for all tokens `ids` (T,) and return the values that the second part reads."""
        inputs = self.program.inputs
        env = {inputs.ids.buffer: ids[:, None], inputs.positions.buffer: step.positions[:, None]}
        _run(self._body, step, env)
        return env

    @torch.inference_mode()
    def tail(self, step: StepState, env: Env) -> Tensor:
        """Return logits (R, vocabulary) of the rows `step.samples`. Does not change `env`."""
        env = dict(env)
        _run(self._tail, step, env)
        return _view(env, self.program.logits)


def _run(lines: list[_Line], step: StepState, env: Env) -> None:
    for line in lines:
        made = line.kernel(line.op, step, *[_view(env, v) for v in line.reads])
        results = made if isinstance(made, tuple) else (made,)
        for v, y in zip(line.writes, results, strict=True):
            env[v.buffer] = kinds.rounded(y) if v.spec.dtype == "int8" else y
        for buffer in line.done:
            del env[buffer]


def _view(env: Env, v: Value) -> Tensor:
    return env[v.buffer] if v.width == v.spec.width else env[v.buffer][:, v.start : v.start + v.width]
