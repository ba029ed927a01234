"""A rank's part of a step beside the launches of its program: rank 0 chooses tokens, which the device sends to the
others; decisions that all ranks must take alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from tokenmill.backends.base import Masks, StepInputs
from tokenmill.backends.cuda.collectives.base import Collectives
from tokenmill.backends.cuda.collectives.make import collectives_of
from tokenmill.backends.cuda.device import Device
from tokenmill.backends.cuda.memory import Memory
from tokenmill.backends.cuda.sampler import Needs, Sampler
from tokenmill.backends.cuda.sizes import Sizes
from tokenmill.backends.cuda.slots import CudaSlots
from tokenmill.backends.cuda.step import Marked, T, or_out_of_memory
from tokenmill.backends.torch.sampling import Logprobs
from tokenmill.parallel.group import Group


class Ranks:
    """The ranks of a backend, of which this is one. With one rank, every method is the identity.

    The constructor blocks until all ranks have called it.
    """

    def __init__(self, group: Group, memory: Memory, batch_invariant: bool) -> None:
        self.rank, self.collectives = group.rank, None
        if group.size > 1:
            self.collectives = collectives_of(
                memory.program, memory.rows, memory.dtype, group, memory.device, batch_invariant
            )

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return 0 if self.collectives is None else self.collectives.nbytes

    def sampler(self, own: Sampler, slots: CudaSlots, device: Device) -> Sampler | RankSampler:
        """Return what samples on this rank. `own`: its sampler."""
        return own if self.collectives is None else RankSampler(own, slots, device, self.collectives, self.rank)

    def checked(self, mark: Marked) -> Marked:
        """Return a mark whose wait raises if another rank did not take part in the step."""
        return mark if self.collectives is None else CheckedMark(mark, self.collectives)

    def agree(self, ok: bool) -> bool:
        """Return True if `ok` is true on all ranks."""
        return ok if self.collectives is None else self.collectives.agree(ok)

    def unlaunched(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which collective operations are not launched, because kernels are only recorded."""
        return contextlib.nullcontext() if self.collectives is None else self.collectives.unlaunched()

    def started(self) -> None:
        """Declare the warm-up of all ranks done: from now on, none waits long for another."""
        if self.collectives is not None:
            self.collectives.started()

    def launch(self, run: Callable[[], T]) -> T:
        """Call `run` and return its result. With one rank, torch's OutOfMemoryError is raised as OutOfMemory.

        With several, the others may have had memory: their plans would differ.
        """
        return or_out_of_memory(run) if self.collectives is None else run()

    def close(self) -> None:
        """Leave the other ranks. Idempotent."""
        if self.collectives is not None:
            self.collectives.close()


class RankSampler:
    """Does what a `Sampler` does, on every rank. `sampler`: this rank's; its memory serves the tokens of rank 0."""

    def __init__(self, sampler: Sampler, slots: CudaSlots, device: Device, collectives: Collectives, rank: int) -> None:
        self._sampler, self._slots, self._device, self._rank = sampler, slots, device, rank
        self._spreading = collectives.spreading(sampler.chosen, slots.tokens)
        self.nbytes, self.step_bytes = sampler.nbytes, sampler.step_bytes

    def launch(self, sizes: Sizes) -> None:
        """See `Sampler`."""
        if self._rank == 0:
            self._sampler.launch(sizes)
        self._spreading.run(sizes, sizes.sampling)

    def sample(
        self, inputs: StepInputs, sizes: Sizes, chosen: bool = False, masks: Masks | None = None
    ) -> tuple[Tensor, Logprobs | None]:
        """See `Sampler`. Ranks other than 0 return no log-probabilities."""
        rows = len(inputs.samples)
        found: tuple[Tensor | None, Logprobs | None] = None, None
        if self._rank == 0:
            found = self._sampler.sample(inputs, sizes, chosen, masks)
        if not chosen or self._changes(inputs):
            self._spreading.run(sizes, rows)
        return self._device.fetch(self._sampler.chosen[:rows]) if found[0] is None else found[0], found[1]

    def _changes(self, inputs: StepInputs) -> bool:
        """Return True if `Sampler.sample` may replace tokens that `launch` chose. All ranks find the same."""
        slots = inputs.slots[inputs.samples]
        needs = Needs.of(self._slots.parameters.rows[slots], inputs.tail == "full")
        return needs.changes or bool(self._slots.masked[slots].any())

    def warm_up(self, sizes: Sizes) -> None:
        """See `Sampler`."""
        if self._rank == 0:
            self._sampler.warm_up(sizes)

    def warm_up_some(self, step: Tensor) -> None:
        """See `Sampler`. Launch the kernel that sends tokens, too."""
        if self._rank == 0:
            self._sampler.warm_up_some(step)
        rows = torch.zeros(1, dtype=torch.int32, device=step.device)
        step[:1], step[1:2] = self._slots.padding, 0
        self._spreading.run(Sizes(1, 1, step[:2], rows), 1)


class CheckedMark:
    """A `Mark` whose wait ends with an error if another rank did not take part in the step."""

    def __init__(self, mark: Marked, collectives: Collectives) -> None:
        self._mark, self._collectives = mark, collectives

    def wait(self) -> None:
        """Wait until the device has passed the mark. Raise RankAbsent."""
        self._mark.wait()
        self._collectives.check()
