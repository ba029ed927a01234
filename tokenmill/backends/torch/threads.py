"""Number of threads of torch's operations in this process."""

from __future__ import annotations

import torch


def set_threads(count: int) -> None:
    """Set the number for threads that begin to compute from now on. Call before a backend is made."""
    torch.set_num_threads(count)
