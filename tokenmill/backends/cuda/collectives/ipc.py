"""Memory of a GPU that other processes of the machine write to, by the driver's library (CUDA IPC).

The processes may use different cards, if these reach each other, or one.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenmill.backends.cuda.collectives.peers import Shared
from tokenmill.parallel.group import Group

_GRAIN = 2 << 20  # bytes: the driver maps no less
_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1
_NATIVE_ATOMICS = 3  # attribute of a pair of cards
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Unshareable(Exception):
    """Ranks cannot write to each other's memory, for the reason given."""


class _Handle(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * _HANDLE_BYTES)]


class _Memory:
    """Device memory that torch sees as a tensor without owning it."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3
        }  # fmt: skip


class IpcMemory:
    """Memory of this rank that all ranks of a group have mapped. `shared`: see `Shared`.

    The constructor blocks until all ranks have called theirs. It raises Unshareable on every rank if one cannot map the
    memory of another one.
    """

    def __init__(self, group: Group, nbytes: int, device: torch.device) -> None:
        self._driver, self._opened, self._own = ctypes.CDLL("libcuda.so.1"), list[int](), 0
        nbytes = -(-nbytes // _GRAIN) * _GRAIN
        try:
            given = {"handle": self._make(nbytes, device), **_place(device)}
        except Unshareable as reason:
            given = {"failed": str(reason)}
        found: list[dict[str, Any]] = [json.loads(each) for each in group.exchange(json.dumps(given).encode())]
        try:
            addresses = self._open_all(found, group.rank, device)
            why = ""
        except Unshareable as reason:
            addresses, why = [], str(reason)
        reasons = [each.decode() for each in group.exchange(why.encode())]
        if any(reasons):
            self.close()
            raise Unshareable(next(filter(None, reasons)))
        own: Tensor = torch.as_tensor(_Memory(self._own, nbytes), device=device)
        deltas = torch.tensor([address - self._own for address in addresses], dtype=torch.int64, device=device)
        torch.cuda.synchronize(device)
        self.shared = Shared(group.rank, own, deltas)
        self.one_card = len({each["card"] for each in found}) < group.size
        group.exchange(b"")  # No rank writes before all memory is zero.

    def close(self) -> None:
        """Unmap the memory of the others, and free this rank's. Idempotent. Call once no kernel uses them."""
        for address in self._opened:
            self._driver.cuIpcCloseMemHandle(ctypes.c_uint64(address))
        self._opened.clear()
        if self._own:
            self._driver.cuMemFree_v2(ctypes.c_uint64(self._own))
            self._own = 0

    def _make(self, nbytes: int, device: torch.device) -> str:
        torch.zeros(1, device=device)  # makes the device's context current
        address, handle = ctypes.c_uint64(0), _Handle()
        if self._driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(nbytes)) != 0:
            raise torch.OutOfMemoryError(f"no {nbytes} bytes for collective operations")
        self._own = address.value
        if self._driver.cuMemsetD8_v2(address, ctypes.c_ubyte(0), ctypes.c_size_t(nbytes)) != 0:
            raise Unshareable("its memory cannot be written to")
        if self._driver.cuIpcGetMemHandle(ctypes.byref(handle), address) != 0:
            raise Unshareable("the driver shares no memory between processes (CUDA IPC)")
        return ctypes.string_at(ctypes.byref(handle), _HANDLE_BYTES).hex()

    def _open_all(self, found: Sequence[dict[str, Any]], rank: int, device: torch.device) -> list[int]:
        """Return the addresses of all ranks' memory."""
        if failed := [f"rank {i}: {each['failed']}" for i, each in enumerate(found) if "failed" in each]:
            raise Unshareable(failed[0])
        if len({each["host"] for each in found}) > 1:
            raise Unshareable("the ranks are on several machines")
        addresses = []
        for peer, each in enumerate(found):
            if peer != rank:
                self._check_atomics(rank, peer, each["card"], device)
            addresses.append(self._own if peer == rank else self._open(each["handle"], peer))
        return addresses

    def _open(self, text: str, peer: int) -> int:
        handle, address = _Handle(), ctypes.c_uint64(0)
        ctypes.memmove(ctypes.byref(handle), bytes.fromhex(text), _HANDLE_BYTES)
        error = self._driver.cuIpcOpenMemHandle_v2(ctypes.byref(address), handle, ctypes.c_uint(_LAZY_PEER_ACCESS))
        if error != 0:
            raise Unshareable(f"the memory of rank {peer} cannot be mapped (error {error} of the driver)")
        self._opened.append(address.value)
        return address.value

    def _check_atomics(self, rank: int, peer: int, card: str, device: torch.device) -> None:
        """Raise Unshareable if this card cannot set a flag in another one's memory, as over PCIe."""
        mine = device.index or 0
        other = next((i for i in range(torch.cuda.device_count()) if _card(i) == card), mine)
        found = ctypes.c_int(0)
        if other == mine:
            return
        if self._driver.cuDeviceGetP2PAttribute(ctypes.byref(found), _NATIVE_ATOMICS, mine, other) != 0 or not found:
            raise Unshareable(f"the cards of ranks {rank} and {peer} are not connected by NVLink")


def _place(device: torch.device) -> dict[str, str]:
    """Return what tells machines and cards apart."""
    return {"host": _BOOT_ID.read_text().strip(), "card": _card(device.index or 0)}


def _card(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
