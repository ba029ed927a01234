"""Memory of CUDA devices that may still be taken, for every backend that computes on one."""

from __future__ import annotations

import torch

from tokenmill.backends.kind import BackendOptions


def room(options: BackendOptions, device: str) -> int:
    """Return the bytes that may still be taken of a device: of all of it the user's share, less what is used."""
    free, total = torch.cuda.mem_get_info(device)
    return min(int(free), int(total * options.cuda_memory_fraction) - int(total - free))
