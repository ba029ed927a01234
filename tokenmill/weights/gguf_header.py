"""Read the headers of GGUF files: metadata, and the places of tensors.

Files are untrusted: every count, length and offset is checked against the file's size before use. (Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmill.errors import ModelError
from tokenmill.weights.checkpoint import map_file
from tokenmill.weights.source import adapter_error

KINDS = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
BLOCKS = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "F64": (1, 8), "I8": (1, 1), "I16": (1, 2), "I32": (1, 4),
    "I64": (1, 8), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "IQ4_NL": (32, 18), "IQ4_XS": (256, 136), "MXFP4": (32, 17), "TQ1_0": (256, 54), "TQ2_0": (256, 66),
    "IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98), "IQ3_S": (256, 110),
}  # fmt: skip
"""type -> (elements of a block, bytes of a block). Other types have a name only, and are refused when read."""

INDEXED = frozenset(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"))
"""Types whose codes are indexes of tables, which take more memory once they are read"""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file."""

    kind: str
    shape: tuple[int, ...]  # rows first
    mapped: NDArray[np.uint8]  # the file that holds it
    start: int
    nbytes: int


class _Header:
    """Bounds-checked cursor over the mapped file."""

    def __init__(self, path: Path, mapped: NDArray[np.uint8], strings: bool) -> None:
        self.path, self.mapped, self.view, self.at, self.strings = path, mapped, mapped.data, 0, strings

    def bad(self, why: str) -> ModelError:
        return ModelError(f"{self.path} is no readable GGUF file: {why} (at byte {self.at}).")

    def room(self, nbytes: int) -> None:
        if nbytes > len(self.view) - self.at:
            raise self.bad(
                f"{nbytes} bytes wanted where {len(self.view) - self.at} are left; the file may be cut off, download "
                "it again"
            )

    def take(self, form: str) -> tuple[Any, ...]:
        size = struct.calcsize("<" + form)
        self.room(size)
        self.at += size
        return struct.unpack_from("<" + form, self.view, self.at - size)

    def text(self) -> str:
        (n,) = self.take("Q")
        self.room(n)
        self.at += n
        return str(self.view[self.at - n : self.at], "utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self.array(*self.take("IQ"))
        if kind not in _SCALARS:
            raise self.bad(f"value of unknown type {kind}")
        return self.take(_SCALARS[kind])[0]

    def array(self, kind: int, n: int) -> list[Any] | None:
        """Read a list; skip a list of strings and return None if strings are off, as they take most of the time."""
        if kind == _STRING:
            self.room(8 * n)
            if self.strings:
                return [self.text() for _ in range(n)]
            for _ in range(n):
                self.room(8)
                length = int.from_bytes(self.view[self.at : self.at + 8], "little")
                self.at += 8
                self.room(length)
                self.at += length
            return None
        if kind not in _SCALARS:  # nested lists do not occur in practice
            raise self.bad(f"a list of type {kind}")
        self.room(n * struct.calcsize("<" + _SCALARS[kind]))
        return list(self.take(f"{n}{_SCALARS[kind]}"))

    def metadata(self, count: int) -> dict[str, Any]:
        self.room(count * 12)  # minimum size of an entry
        found: dict[str, Any] = {}
        for _ in range(count):
            name = self.text()
            if name in found:
                raise self.bad(f"the key {name!r} is there twice")
            found[name] = self.value(*self.take("I"))
        return found

    def tensors(self, count: int) -> dict[str, tuple[str, tuple[int, ...], int]]:
        """Read the tensor list: name -> (type, shape with rows first, offset)."""
        self.room(count * 24)
        found: dict[str, tuple[str, tuple[int, ...], int]] = {}
        for _ in range(count):
            name, (n,) = self.text(), self.take("I")
            if n > _MAX_DIMS or name in found:
                raise self.bad(f"the tensor {name!r} has {n} dimensions or is there twice")
            shape = self.take(f"{n}Q")[::-1]
            kind, offset = self.take("IQ")
            found[name] = KINDS.get(kind, f"type {kind}"), shape, offset
        return found


def read_part(path: Path, number: int, count: int, strings: bool) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Read metadata and tensors of one file, which by its name is part `number` (from 0) of `count`."""
    header = _Header(path, map_file(path), strings)
    magic, version = header.take("4sI")
    if magic != b"GGUF":
        raise header.bad("it does not begin with GGUF")
    if version not in (2, 3):
        raise header.bad(f"version {version}; 2 and 3 are known")
    tensors, keys = header.take("QQ")
    metadata = header.metadata(keys)
    _refuse_other_contents(path, metadata)
    told = metadata.get("split.no", 0), metadata.get("split.count", 0) or 1
    if not isinstance(told[0], int) or not isinstance(told[1], int):
        raise header.bad(f"split.no {told[0]!r}, split.count {told[1]!r}")
    if told != (number, count):
        raise _out_of_place(path, told, (number, count))
    return metadata, _place(header, metadata.get("general.alignment", 32), header.tensors(tensors))


def _place(header: _Header, align: Any, listed: dict[str, tuple[str, tuple[int, ...], int]]) -> dict[str, Entry]:
    if not isinstance(align, int) or align < 1 or align > 1 << 20 or align & align - 1:
        raise header.bad(f"alignment {align!r}")
    mapped = header.mapped
    base, entries, end, before = -(-header.at // align) * align, {}, 0, ""
    for name, (kind, shape, offset) in sorted(listed.items(), key=lambda item: item[1][2]):
        elements, size = BLOCKS.get(kind, (1, 0))  # the size of an unknown type cannot be checked
        if shape and shape[-1] % elements:
            raise header.bad(f"{name!r} has rows of {shape[-1]}, no multiple of {kind}'s {elements}")
        entry = Entry(kind, shape, mapped, base + offset, prod(shape) // elements * size)
        if entry.start + entry.nbytes > len(mapped):
            raise header.bad(
                f"{name!r} ends at byte {entry.start + entry.nbytes}, the file at {len(mapped)}; the file is cut off, "
                "download it again"
            )
        if entry.start < end and entry.nbytes:
            raise header.bad(f"the tensors {before!r} and {name!r} overlap")
        end, before, entries[name] = entry.start + entry.nbytes, name, entry
    return entries


def _out_of_place(path: Path, told: tuple[Any, Any], named: tuple[int, int]) -> ModelError:
    if named[1] == 1:
        return ModelError(
            f"{path} is one of {told[1]} parts. Give it among the others under its name, which ends in "
            f"-{told[0] + 1:05}-of-{told[1]:05}.gguf, or join them: llama-gguf-split --merge."
        )
    return ModelError(
        f"{path} is part {told[0] + 1} of {told[1]} by its header, and part {named[0] + 1} of {named[1]} by its name. "
        "Download the parts again."
    )


def _refuse_other_contents(path: Path, metadata: dict[str, Any]) -> None:
    """Raise ModelError for a file that holds an adapter, an image projector or calibration data, not a model."""
    kind = metadata.get("general.type", "model")
    if kind == "adapter":
        base = {
            "base_model_name_or_path": _base_model(metadata),
            "peft_type": str(metadata.get("adapter.type", "")).upper(),
        }
        raise adapter_error(str(path), base)
    if kind in ("mmproj", "imatrix") or metadata.get("general.architecture") == "clip":
        what = "calibration data (imatrix)" if kind == "imatrix" else "the projector of a model's images (mmproj)"
        raise ModelError(f"{path} holds {what}, no language model. Give the model's own GGUF file.")


def _base_model(metadata: dict[str, Any]) -> Any:
    keys = ("general.base_model.0.repo_url", "general.base_model.0.name", "general.basename")
    return next((metadata[key] for key in keys if metadata.get(key)), None)
