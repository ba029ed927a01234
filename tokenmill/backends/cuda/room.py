"""Free memory of a CUDA device, for every backend that computes on one."""

from __future__ import annotations

import torch

from tokenmill.backends.kind import BackendOptions


def room(options: BackendOptions, device: str) -> int:
    """Return the bytes of this rank's device that may still be taken, divided by the ranks that compute on it: the
    user's share of its memory, less the bytes in use.
    """
    free, total = torch.cuda.mem_get_info(f"{device}:{options.device_index}")
    left = min(int(free), int(total * options.cuda_memory_fraction) - int(total - free))
    return left // options.device_sharers
