"""Calls of single kernels of the CPU backend, for each instruction set that this machine can run."""

from __future__ import annotations

import threading

import numpy as np
from support_cpu import kernel_folder

from tokenmill.backends.cpu import isa, layout
from tokenmill.backends.cpu.cache import KernelCache

ISAS = [i.name for i in isa.available()]


def load(name, kernels):
    """Return compiled kernels, cached between runs. The result must outlive their use."""
    return KernelCache(kernel_folder(), isa.detect(name), jobs=2).load(kernels)


def address(array):
    return array.ctypes.data


def walk(function, row, context, threads=1):
    """Run a kernel on some threads and return its result. `row`, `context`: words by column."""
    counter = np.zeros(8, np.int64)
    words = [np.zeros(size, np.int64) for size in (layout.COLUMNS, layout.CONTEXT)]
    for array, given in zip(words, (row, context | {layout.THREADS: threads}), strict=True):
        for column, word in given.items():
            array[column] = word
    args = [address(a) for a in (*words, counter)]
    returned = []
    walkers = [threading.Thread(target=lambda tid=tid: returned.append(function(tid, *args))) for tid in range(threads)]
    for walker in walkers:
        walker.start()
    for walker in walkers:
        walker.join()
    assert len(set(returned)) == 1
    return returned[0]


def matrix(values, dtype=np.float32):
    """Return a 64-byte aligned copy with rows padded to whole vectors of 16, and the bytes of a row."""
    rows, width = values.shape
    padded = -(-width // 16) * 16
    whole = np.zeros(rows * padded * np.dtype(dtype).itemsize + 64, np.uint8)
    start = -whole.ctypes.data % 64
    out = whole[start : start + rows * padded * np.dtype(dtype).itemsize].view(dtype).reshape(rows, padded)
    out[:, :width] = values
    return out


def quantized(x):
    """Quantize (rows, width) to codes and (rows, blocks, 2) scales, as `vectors.quantize_block` defines them."""
    blocks = x.astype(np.float32).reshape(len(x), -1, 32)
    top = np.abs(blocks).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
    codes = np.rint(blocks * inverse)
    norm = (codes * codes).sum(-1, keepdims=True)
    scale = np.divide((codes * blocks).sum(-1, keepdims=True), norm, out=np.zeros_like(top), where=norm > 0)
    return codes.reshape(x.shape).astype(np.int8), np.concatenate([scale, scale * codes.sum(-1, keepdims=True)], -1)
