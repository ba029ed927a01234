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
    """Return why no CUDA device can be used here; "" if one can."""
    if not sys.platform.startswith("linux"):
        return "it runs on Linux only"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "this machine has no NVIDIA driver"
    if driver.cuInit(0) != 0:
        return "the NVIDIA driver cannot be used"
    if num_devices() < 1:
        return "no CUDA device is visible"
    for name in ("torch", "triton"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed (`pip install 'tokenmill[cuda]'`)"
    return ""


def num_devices() -> int:
    """Return the number of devices that this process sees; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    usable = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if usable else 0


def device_name(index: int = 0) -> str:
    """Return the driver's name of a device. Call only if nothing is `missing`."""
    driver = ctypes.CDLL("libcuda.so.1")
    device, name = ctypes.c_int(0), ctypes.create_string_buffer(128)
    driver.cuInit(0)
    if driver.cuDeviceGet(ctypes.byref(device), index) != 0 or driver.cuDeviceGetName(name, 128, device) != 0:
        return "a CUDA device"
    return name.value.decode(errors="replace")


def capability(index: int = 0) -> tuple[int, int]:
    """Return a device's compute capability; (0, 0) if the driver has none. Call only if nothing is `missing`."""
    driver = ctypes.CDLL("libcuda.so.1")
    device, parts = ctypes.c_int(0), (ctypes.c_int(0), ctypes.c_int(0))
    driver.cuInit(0)
    driver.cuDeviceGet(ctypes.byref(device), index)
    for part, number in zip(parts, (_MAJOR, _MINOR), strict=True):
        driver.cuDeviceGetAttribute(ctypes.byref(part), number, device)
    return parts[0].value, parts[1].value


def not_compilable() -> str:
    """Return why Triton cannot compile its C launchers here, with the cure; "" if it can.

    Triton compiles them once on a machine and caches them. A compiler named by CC is not checked.
    """
    if shutil.which("gcc") is None and shutil.which("clang") is None:
        return "no C compiler is on PATH, which Triton needs at the first start: install gcc or clang, or set CC"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return f"Python's headers are not installed, which Triton needs at the first start: install {version}-dev"
    return ""


def flashinfer_missing() -> str:
    """Return why flashinfer cannot be imported here, with the cure; "" if it can. Its compilers are not checked."""
    for name, package in (("flashinfer", "flashinfer-python"), ("tvm_ffi", "apache-tvm-ffi")):
        if importlib.util.find_spec(name) is None:
            return f"{package} is not installed (`pip install {package}`)"
    return ""


def flashinfer_version() -> str:
    """Return the installed version of flashinfer, and the compilers that it lacks. Call only if it is installed."""
    version = importlib.metadata.version("flashinfer-python")
    if importlib.util.find_spec("flashinfer_jit_cache") is not None:
        return f"{version}, its kernels from flashinfer-jit-cache"
    lacking = [name for name in _COMPILERS if shutil.which(name) is None]
    return f"{version}" + (f"; {' and '.join(lacking)} not found, which compile its kernels" if lacking else "")
