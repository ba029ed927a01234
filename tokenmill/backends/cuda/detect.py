"""Whether this machine has a CUDA device: asks the driver's library, imports no torch."""

from __future__ import annotations

import ctypes
import importlib.util
import sys


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
    """What the driver calls a device. Call it where nothing is `missing`."""
    driver = ctypes.CDLL("libcuda.so.1")
    device, name = ctypes.c_int(0), ctypes.create_string_buffer(128)
    driver.cuInit(0)
    if driver.cuDeviceGet(ctypes.byref(device), index) != 0 or driver.cuDeviceGetName(name, 128, device) != 0:
        return "a CUDA device"
    return name.value.decode(errors="replace")
