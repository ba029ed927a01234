"""Launches of Triton's kernels at little cost to the host.

Triton inspects every argument of every launch to find the matching compiled kernel: 20–70 µs, and an eager step has
hundreds of launches. Here a site of the program that launches a kernel always passes arguments of the same kinds, so
the kernel found at its first launch is launched from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor
from triton.runtime import JITFunction, driver
from triton.runtime.errors import OutOfResources

from tokenmill.backends.cuda.sizes import Sizes
from tokenmill.program.ops import Op

Run = Callable[[Sizes], None]
"""Launches for a step of these sizes."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One operation, ready to run."""

    op: Op
    run: Run


_KNOWN = ("3.4", "3.5", "3.6", "3.7")
"""Versions of Triton whose compiled kernels can be launched as here. With others, Triton does each launch."""


class Site:
    """A launch site of `kernel`: `site(grid, *arguments, **constants)`.

    Invariant: the arguments of two launches with the same constants have the same types, and the same alignment and
    integer values wherever the kernel may be specialized for them; constants come in the same order.
    """

    __slots__ = ("_found", "_kernel", "_names")

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._names: list[str] = list(getattr(kernel, "arg_names", ()))
        self._found: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __call__(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """Launch the kernel. `arguments`: tensors, descriptors, numbers. `constants`: of its compilation."""
        found = self._found.get(tuple(constants.values()))
        if found is None:
            self._first(grid, arguments, constants)
            return
        compiled, rest = found
        size = len(grid)
        numbers = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]  # Triton calls the driver for each.
        compiled.run(
            grid[0], grid[1] if size > 1 else 1, grid[2] if size > 2 else 1, _stream(), compiled.function,
            compiled.packed_metadata, None, None, None, *numbers, *rest,
        )  # fmt: skip

    def _first(self, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        key = tuple(constants.values())
        while True:
            try:
                compiled = self._kernel[grid](*arguments, **constants)
                break
            except OutOfResources:  # Sizes suit cards with much shared memory; fewer stages need less.
                if constants.get("STAGES", 1) == 1:
                    raise
                constants = {**constants, "STAGES": constants["STAGES"] - 1}
        direct = isinstance(self._kernel, JITFunction) and triton.__version__.startswith(_KNOWN)
        if direct and compiled is not None:  # None: a hook kept Triton from compiling.
            rest = tuple(constants[name] for name in self._names[len(arguments) :])
            self._found[key] = compiled, rest


def _stream() -> int:
    """Return the current stream, which is the capture's while a graph is captured."""
    active = driver.active
    stream: int = active.get_current_stream(active.get_current_device())
    return stream


def ahead(early: bool) -> dict[str, bool]:
    """Return the launch options of a kernel that itself waits for the one before."""
    return {"launch_pdl": True} if early else {}
