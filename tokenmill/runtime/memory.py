"""Number of KV cache blocks that fit: a pure function of a few numbers, and the measurement of free memory."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

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
_NO_LIMIT = 1 << 60  # cgroup v1 writes a number near 2**63 for "no limit"


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


def available_bytes(root: str = "/") -> int:
    """Return the bytes that this process may still allocate, by the machine's free memory, its cgroups and its ulimits.

    `root`: parent of /proc and /sys, for tests.
    """
    return min([int(psutil.virtual_memory().available), *_free_in_cgroups(Path(root)), *_free_in_ulimits(Path(root))])


def _free_in_ulimits(root: Path) -> Iterator[int]:
    """Yield the bytes left by the limits of address space (`ulimit -v`) and data (`ulimit -d`), if they are set."""
    try:
        lines = (root / "proc/self/status").read_text().splitlines()
    except OSError:
        return
    used = {line.partition(":")[0]: int(line.split()[1]) << 10 for line in lines if line.endswith(" kB")}
    for kind, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY and name in used:
            yield max(limit - used[name], 0)


def _free_in_cgroups(root: Path) -> Iterator[int]:
    """Yield the bytes left by each enclosing cgroup, v2 or v1. Reclaimable file pages do not count as used."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers == "":
            base, names = mount, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = mount / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = base / own.lstrip("/")
        for group in (folder, *folder.parents):
            if (free := _free_in_cgroup(group, *names)) is not None:
                yield free
            if group == base:
                break


def _free_in_cgroup(group: Path, limit_name: str, usage_name: str, droppable: str) -> int | None:
    """Return the bytes left in one cgroup; None if it has no limit, or is not visible in a container."""
    try:
        limit = int((group / limit_name).read_text())
        usage = int((group / usage_name).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = usage - int(stat.get(droppable, 0))
    except (OSError, ValueError):  # no such file, or "max": no limit
        return None
    return limit - used if limit < _NO_LIMIT else None
