"""Number of KV cache blocks that fit: a pure function of a few numbers."""

from __future__ import annotations

from dataclasses import dataclass

from tokenmill.engine.tables import Tables
from tokenmill.errors import NotEnoughMemory

SHARE = 0.5  # of free memory for the cache if there is no limit: other processes use the host's memory too
CACHE_BYTES = 4 << 30  # cap on the cache without a limit, over all ranks, unless one full sequence needs more
DEVICE_RESERVE = 256 << 20  # bytes of a GPU kept free for rounding by allocators and for fragmentation
_CURE = "Lower --max-total-tokens, raise --memory-limit, or serve a smaller model."
_DEVICE_CURE = (
    "Lower --max-total-tokens, --max-batch-size or --max-batch-prefill-tokens, raise --cuda-memory-fraction or "
    "--memory-limit, or serve a smaller model."
)


@dataclass(frozen=True, slots=True)
class Demand:
    """Memory demand of one rank."""

    block_bytes: int  # of one block
    step_bytes: int  # of the largest step, besides weights and cache
    tables: Tables  # of a sequence
    max_batch_size: int  # sequences at once
    max_total_tokens: int  # of the longest sequence
    claimed_bytes: int = 0  # part of `step_bytes` that is already allocated
    wanted_tokens: int = 2  # a sequence of this length must fit: the user's `max_total_tokens`, or the least of use

    def blocks_of(self, tokens: int) -> int:
        """Return the number of blocks of a sequence of `tokens` tokens."""
        return self.tables.blocks_of(tokens)


def check_weights(weight_bytes: int, available: int, limit: int | None = None) -> None:
    """Raise NotEnoughMemory if the weights of all ranks of this machine do not fit. Called before they are read."""
    free = available if limit is None else min(limit, available)
    if weight_bytes > free:
        what = "are free" if limit is None or limit > available else "are allowed by the memory limit"
        raise NotEnoughMemory(
            f"The model's weights need {size(weight_bytes)}, but {size(free)} {what}. Serve a smaller or a "
            "quantized model."
        )


def count_blocks(
    demand: Demand, available: int, weight_bytes: int = 0, limit: int | None = None, ranks: int = 1
) -> int:
    """Return the number of KV cache blocks to allocate on a CPU.

    `available`: free bytes, after the weights were loaded. `limit`: bytes of weights, step and cache together; None:
    the cache gets at most `SHARE` of the free memory, and at most `CACHE_BYTES` over all ranks unless one sequence of
    full length needs more. The result is at most the number of blocks that all slots at full length use. Raise
    NotEnoughMemory, with both sizes, if a sequence of `wanted_tokens` does not fit.
    """
    free = available - demand.step_bytes
    if not demand.block_bytes:
        return _all_blocks(demand, free if limit is None else min(limit - weight_bytes - demand.step_bytes, free))
    if limit is not None:
        budget = min(limit - weight_bytes - demand.step_bytes, free)
    else:
        least = demand.blocks_of(demand.max_total_tokens) * demand.block_bytes
        budget = min(int(free * SHARE), max(CACHE_BYTES // ranks, least))
    needed = demand.blocks_of(demand.wanted_tokens)
    if limit is None and budget < needed * demand.block_bytes <= free * 0.9:
        budget = needed * demand.block_bytes  # the user's `max_total_tokens` takes precedence over the share
    blocks = max(budget, 0) // demand.block_bytes
    if blocks < needed:
        raise NotEnoughMemory(_refusal(demand, needed, budget, weight_bytes, limit))
    return min(blocks, demand.blocks_of(demand.max_total_tokens) * demand.max_batch_size)


def count_device_blocks(demand: Demand, free: int, weight_bytes: int = 0, limit: int | None = None) -> int:
    """Return the number of KV cache blocks to allocate on a GPU: all of `free` but the step and a reserve.

    `free`: free bytes that may be used, after the weights were loaded. `limit`: as in `count_blocks`. Raise
    NotEnoughMemory as `count_blocks`.
    """
    budget = free - (demand.step_bytes - demand.claimed_bytes) - DEVICE_RESERVE - free // 100
    if limit is not None:
        budget = min(budget, limit - weight_bytes - demand.step_bytes)
    if not demand.block_bytes:
        return _all_blocks(demand, budget)
    needed = demand.blocks_of(demand.wanted_tokens)
    blocks = max(budget, 0) // demand.block_bytes
    if blocks < needed:
        raise NotEnoughMemory(_refusal(demand, needed, budget, weight_bytes, limit, _DEVICE_CURE))
    return min(blocks, demand.blocks_of(demand.max_total_tokens) * demand.max_batch_size)


def _all_blocks(demand: Demand, budget: int) -> int:
    """Return the number of blocks that all slots at full length use, for a model whose blocks hold nothing.

    Raise NotEnoughMemory if `budget` is negative: the bytes left beside weights, states and a step.
    """
    if budget < 0:
        raise NotEnoughMemory(
            f"The states of {demand.max_batch_size} sequences and a step need {size(demand.step_bytes)}: "
            f"{size(-budget)} more than there is beside the weights. Lower --max-batch-size, or serve a smaller model."
        )
    return demand.blocks_of(demand.max_total_tokens) * demand.max_batch_size


def fitting_states(num_bytes: int, available: int, most: int) -> int:
    """Return how many sequences of a state of `num_bytes` each may run at once: `most`, or fewer.

    At least one. All states together get a quarter of the `available` bytes, so that a cache fits beside them.
    """
    return max(1, min(most, available // 4 // num_bytes)) if num_bytes else most


def _refusal(demand: Demand, needed: int, budget: int, weight_bytes: int, limit: int | None, cure: str = _CURE) -> str:
    where = "are free after the weights were loaded"
    if limit is not None:
        taken = f"weights {size(weight_bytes)}, a step {size(demand.step_bytes)}"
        where = f"are left of the memory limit of {size(limit)} ({taken})"
    return (
        f"The KV cache of one sequence of {demand.wanted_tokens} tokens needs {size(needed * demand.block_bytes)}, but "
        f"{size(max(budget, 0))} {where}. {cure}"
    )


def size(num_bytes: int) -> str:
    """Return a number of bytes as text for people: "1.5 GiB"."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
