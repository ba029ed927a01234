"""Detection of an NVIDIA GPU and of the packages for it, by the driver's library. Imports no torch."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import shutil
import sys
import sysconfig
from pathlib import Path

_MAJOR, _MINOR = 75, 76  # the driver's numbers for the two parts of a compute capability
_COMPILERS = ("nvcc", "ninja")


def missing() -> str:
    """Why no CUDA device can be used here; "" if one can."""
    if not sys.platform.startswith("linux"):
        return "it runs on Linux only"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "this machine has no NVIDIA driver"
    if driver.cuInit(0) != 0:
        return "the NVIDIA driver cannot be used"
    count = ctypes.c_int(0)
    if driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value < 1:
        return "no CUDA device is visible"
    for name in ("torch", "triton"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed (`pip install 'tokenmill[cuda]'`)"
    return ""


def device_name(index: int = 0) -> str:
    """Return the driver's name of a device. Call only if nothing is `missing`."""
    driver = ctypes.CDLL("libcuda.so.1")
    device, name = ctypes.c_int(0), ctypes.create_string_buffer(128)
    driver.cuInit(0)
    if driver.cuDeviceGet(ctypes.byref(device), index) != 0 or driver.cuDeviceGetName(name, 128, device) != 0:
        return "a CUDA device"
    return name.value.decode(errors="replace")


def capability(index: int = 0) -> tuple[int, int]:
    """A device's compute capability; (0, 0) if the driver does not say. Call it where nothing is `missing`."""
    driver = ctypes.CDLL("libcuda.so.1")
    device, parts = ctypes.c_int(0), (ctypes.c_int(0), ctypes.c_int(0))
    driver.cuInit(0)
    driver.cuDeviceGet(ctypes.byref(device), index)
    for part, number in zip(parts, (_MAJOR, _MINOR), strict=True):
        driver.cuDeviceGetAttribute(ctypes.byref(part), number, device)
    return parts[0].value, parts[1].value


def not_compilable() -> str:
    """Why Triton could not compile the few lines of C that it calls the driver by, and the cure; "" if it can.

    It does so once on a machine, and keeps them. A compiler that CC names is not looked for.
    """
    if shutil.which("gcc") is None and shutil.which("clang") is None:
        return "no C compiler is on PATH, which Triton needs at the first start: install gcc or clang, or set CC"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return f"Python's headers are not installed, which Triton needs at the first start: install {version}-dev"
    return ""


def flashinfer_missing() -> str:
    """Why flashinfer cannot be imported here, and the cure; "" if it can. Whether it can compile is another matter."""
    for name, package in (("flashinfer", "flashinfer-python"), ("tvm_ffi", "apache-tvm-ffi")):
        if importlib.util.find_spec(name) is None:
            return f"{package} is not installed (`pip install {package}`)"
    return ""


def flashinfer_told() -> str:
    """Which flashinfer is installed, and whether it finds what it compiles its kernels with. Call it if it is there."""
    version = importlib.metadata.version("flashinfer-python")
    if importlib.util.find_spec("flashinfer_jit_cache") is not None:
        return f"{version}, its kernels from flashinfer-jit-cache"
    lacking = [name for name in _COMPILERS if shutil.which(name) is None]
    return f"{version}" + (f"; {' and '.join(lacking)} not found, which compile its kernels" if lacking else "")
