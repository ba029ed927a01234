"""States of fixed size by slot on the device, and the sizes of tiles of the kernels that keep them.

A slot has a ring of two states, as on `backends.torch`. Kernels read the one before a row's first token and write the
one after its last, so a captured decode step needs nothing but the slots and positions of its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tokenmill.backends.base import StepInputs
from tokenmill.backends.cuda.device import Device
from tokenmill.backends.rings import RingProgress
from tokenmill.backends.steps import STATE_RING
from tokenmill.program.keeps import StateSpec


class StateShapes(NamedTuple):
    """Sizes of tiles, from measurements (`bench/gpu/states.py`).

    `tile`: numbers of a state that a program keeps for single tokens. `chunk`: tokens of a run that are computed at
    once. `…_columns`: columns of a head in a program, of Mamba without heads: channels.
    """

    tile: int = 8192
    tile_warps: int = 4
    chunk: int = 64
    scan_columns: int = 64
    scan_warps: int = 4
    scan_stages: int = 2
    ready_warps: int = 4  # twice as many with a decay for each column of a key
    ready_registers: int = 0  # at most so many of a thread; 0: as the compiler chooses
    delta_columns: int = 32
    delta_warps: int = 4
    delta_stages: int = 3
    channels: int = 16
    channel_chunk: int = 8
    channel_stages: int = 3
    lru_chunk: int = 64
    lru_stages: int = 3
    lru_columns: int = 16


SHAPES = StateShapes()
SHAPES_OF_FLOAT32 = StateShapes(chunk=32, scan_columns=32)


class CudaStates:
    """The states of all slots, in memory from the start: captured graphs hold their addresses."""

    def __init__(
        self, layout: Mapping[tuple[int, str], StateSpec], num_slots: int, dtype: torch.dtype, device: Device
    ) -> None:
        self.progress = RingProgress(num_slots if layout else 0)
        self._rings = {
            key: torch.zeros(
                (num_slots, STATE_RING, *spec.shape), dtype=torch.float32 if spec.dtype == "float32" else dtype,
                device=device.torch,
            )
            for key, spec in layout.items()
        }  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(ring.nbytes for ring in self._rings.values())

    def ring(self, spec: StateSpec) -> Tensor:
        """Return the states (slots, ring, …) of an operation."""
        return self._rings[spec.key]

    def advance(self, inputs: StepInputs) -> None:
        """Record a step. Raise RuntimeError if a row does not continue where a state of its slot is."""
        if self._rings:
            self.progress.advance(inputs)

    def clear(self) -> None:
        """Drop the states of the warm-up's slot."""
        if self._rings:
            self.progress.clear(0)
        for ring in self._rings.values():
            ring[0].zero_()
