"""Measure what this process may use of its machine: CPUs and memory, within affinity, cgroups and ulimits."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from tokenmill.errors import ArgumentError

_NO_LIMIT = 1 << 60  # cgroup v1 writes a number near 2**63 for "no limit"


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use: its affinity, limited by the cgroup's quota. At least 1."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no cgroup, or a quota of "max"
    return max(1, count)


def check_cpus(ranks: int) -> None:
    """Raise ArgumentError if this process may use fewer CPUs than there are ranks that compute on them."""
    if ranks > (cpus := usable_cpus()):
        raise ArgumentError(
            f"{ranks} ranks on CPUs need one each, but this process may use {cpus} (its affinity and its control "
            "group's quota): ranks would wait for each other. Allow more, or lower --num-shard, "
            "--pipeline-parallel-size or --data-parallel-size."
        )


def has_gpu(devices: str = "/dev") -> bool:
    """Return False if it is certain, at no cost, that this machine has no GPU. `devices`: folder, for tests."""
    return any(next(Path(devices).glob(pattern), None) is not None for pattern in ("nvidia*", "dxg", "kfd"))


def available_bytes(root: str = "/") -> int:
    """Return the bytes that this process may still allocate, by the machine's free memory, its cgroups and its ulimits.

    `root`: parent of /proc and /sys, for tests.
    """
    import psutil  # here, because every command imports this module

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


def cpu_threads(wanted: int, ranks: int, said: bool, warnings: list[str]) -> int:
    """Limit `wanted` threads of each rank to its part of the usable CPUs.

    `said`: True if set for this program, False if by OMP_NUM_THREADS.
    """
    cpus = usable_cpus()
    most = max(1, cpus // ranks)
    if wanted <= most:
        return wanted
    each = f" for each of {ranks} ranks" if ranks > 1 else ""
    if said:
        raise ArgumentError(
            f"`cpu_threads` is {wanted}{each}, but this process may use {cpus} CPUs (its affinity and its control "
            f"group's quota): more threads would wait for each other. Give at most {most}, or leave the option out."
        )
    warnings.append(f"OMP_NUM_THREADS is {wanted}{each}, but this process may use {cpus} CPUs: {most} threads compute.")
    return most
