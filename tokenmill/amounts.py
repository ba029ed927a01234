"""Parse texts of options that are amounts: bytes of memory, lists of sizes."""

from __future__ import annotations

from tokenmill.errors import ArgumentError


def memory_bytes(text: str) -> int | None:
    """Parse a number of bytes: "8GiB", "500MB" or "1073741824"; None for "". Raises ArgumentError."""
    if not text:
        return None
    number = text.rstrip("BbIiKkMmGgTt ")
    unit = text[len(number) :].strip().lower().removesuffix("b")
    scale = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
    try:
        value = int(float(number) * scale[unit])
    except (KeyError, ValueError):
        value = 0
    if value <= 0:
        raise ArgumentError(f"`memory_limit` {text!r} is not an amount of memory; write for example 8GiB or 500MB.")
    return value


def graph_sizes(text: str) -> tuple[int, ...] | None:
    """Parse batch sizes such as "1,2,4"; empty for "0", None for "". Raises ArgumentError."""
    if not text:
        return None
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdecimal() and len(word) < 6 for word in words):
        raise ArgumentError(f"`cuda_graphs` {text!r} is no list of batch sizes; write for example 1,2,4,8, or 0.")
    return tuple(sorted({int(word) for word in words} - {0}))
