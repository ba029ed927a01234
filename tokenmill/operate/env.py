"""Report the runtime environment for bug reports: versions, processors, memory, accelerators. Contains no secrets."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import psutil

import tokenmill
from tokenmill.host import usable_cpus

_PACKAGES = ("numba", "llvmlite", "numpy", "torch", "msgspec", "tokenizers", "safetensors", "huggingface_hub",
             "starlette", "uvicorn", "transformers")  # fmt: skip


def report() -> str:
    """Return the runtime environment, one `name: value` per line. Imports none of the listed packages but llvmlite."""
    rows = {
        "tokenmill": tokenmill.__version__,
        "Python": f"{platform.python_version()} ({sys.executable})",
        "System": platform.platform(),
        "CPU": cpu_name(),
        "Instruction sets": _instruction_sets(),
        "CPUs": f"{usable_cpus()} usable, {psutil.cpu_count()} logical, {psutil.cpu_count(logical=False)} cores",
        "Memory": _memory(),
        "GPUs": _gpus(),
        **{name: _version(name) for name in _PACKAGES},
    }
    return "\n".join(f"{name}: {value}" for name, value in rows.items())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """Return the processor's own name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _instruction_sets() -> str:
    """Return the processor's instruction sets that the CPU backend has kernels for, best first."""
    try:
        from tokenmill.backends.cpu.isa import available
    except ImportError as error:
        return f"unknown ({error})"
    return ", ".join(isa.name for isa in available()) or "none that the CPU backend has kernels for"


def _memory() -> str:
    memory = psutil.virtual_memory()
    return f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB available"


def _gpus() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "none found (no nvidia-smi)"
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi does not answer: {error}"
    return "; ".join(done.stdout.strip().splitlines()) or done.stderr.strip() or "none found"
