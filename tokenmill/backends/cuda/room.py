"""Free memory of a CUDA device, for every backend that computes on one."""

from __future__ import annotations

import torch

from tokenmill.backends.kind import BackendOptions


def room(options: BackendOptions, device: str) -> int:
    """Return the bytes of a device that may still be taken: the user's share of its memory, less the bytes in use."""
    free, total = torch.cuda.mem_get_info(device)
    return min(int(free), int(total * options.cuda_memory_fraction) - int(total - free))
