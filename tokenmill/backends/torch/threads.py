"""How many threads torch's operations may use in this process."""

from __future__ import annotations

import torch


def set_threads(count: int) -> None:
    """For every thread that begins to compute from now on. Call it before a backend is made."""
    torch.set_num_threads(count)
