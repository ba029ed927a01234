"""A launched step, whose sampling may be launched later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from tokenmill.backends.base import Masks, StepResult
from tokenmill.backends.torch.sampling import Logprobs
from tokenmill.errors import OutOfMemory
from tokenmill.wire.messages import Payload

T = TypeVar("T")


class Marked(Protocol):
    """A point in the device's queue."""

    def wait(self) -> None:
        """Wait until the device has passed this point."""


class Sampling(NamedTuple):
    """Output of a step: pinned buffers, complete when the mark has passed; prompt details, complete at once."""

    token_ids: Tensor | None
    logprobs: Logprobs | None
    prompt: dict[int, Payload] | None
    mark: Marked


class CudaStep:
    """A launched step. `sampling` launches its sampling."""

    def __init__(self, sampling: Callable[[Masks | None], Sampling]) -> None:
        self._launch = sampling
        self._sampling: Sampling | None = None

    def sample(self, masks: Masks | None) -> None:
        """See `backends.base.Step`."""
        self._sampling = self._launch(masks)

    def result(self) -> StepResult:
        """See `backends.base.Step`."""
        if self._sampling is None:
            raise OutOfMemory("It was given up.")
        sampled, logprobs, prompt, mark = self._sampling
        mark.wait()
        if sampled is None:
            return StepResult([], None, prompt)
        token_ids: list[int] = sampled.tolist()
        details = None
        if logprobs is not None:
            broken = np.array(token_ids) < 0
            details = replace(logprobs, wanted=np.where(broken, -1, logprobs.wanted)).details()
        return StepResult(token_ids, details, prompt)


def or_out_of_memory(launch: Callable[[], T]) -> T:
    """Call `launch` and return its result. Raise torch's OutOfMemoryError as OutOfMemory."""
    try:
        return launch()
    except torch.OutOfMemoryError as error:
        why = str(error)
    torch.cuda.empty_cache()  # Here no frame of the error holds a tensor any more.
    raise OutOfMemory(why)
