"""Read GGUF files: metadata, and tensors under transformers' names as raw rows of the memory-mapped file.

A split model consists of several such files, the first of which holds the model's metadata. Files are untrusted: every
count, length and offset in a header is checked against the file's size before use. (Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)
"""

from __future__ import annotations

import re
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmill.errors import ModelError
from tokenmill.weights import gguf_config
from tokenmill.weights.checkpoint import Stored, map_file
from tokenmill.weights.choice import parts_of
from tokenmill.weights.gguf_architectures import ARCHITECTURES, Architecture, architecture_of
from tokenmill.weights.gguf_rows import by_head, halves, joined
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
}  # fmt: skip
"""type -> (elements of a block, bytes of a block). Other types have a name only, and are refused when read."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
_HEADS, _KV_HEADS = "num_attention_heads", "num_key_value_heads"
_ONE_ROW = "shared_expert_gate.weight"  # a vector in the file, a matrix of one row in transformers
_KEPT = 4  # reordered tensors: those of a layer
_UNKNOWN = Architecture("", {})


@dataclass(frozen=True, slots=True)
class _Entry:
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


def _read_part(path: Path, number: int, count: int, strings: bool) -> tuple[dict[str, Any], dict[str, _Entry]]:
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


def _place(header: _Header, align: Any, listed: dict[str, tuple[str, tuple[int, ...], int]]) -> dict[str, _Entry]:
    if not isinstance(align, int) or align < 1 or align > 1 << 20 or align & align - 1:
        raise header.bad(f"alignment {align!r}")
    mapped = header.mapped
    base, entries, end, before = -(-header.at // align) * align, {}, 0, ""
    for name, (kind, shape, offset) in sorted(listed.items(), key=lambda item: item[1][2]):
        elements, size = BLOCKS.get(kind, (1, 0))  # the size of an unknown type cannot be checked
        if shape and shape[-1] % elements:
            raise header.bad(f"{name!r} has rows of {shape[-1]}, no multiple of {kind}'s {elements}")
        entry = _Entry(kind, shape, mapped, base + offset, prod(shape) // elements * size)
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


class Gguf:
    """GGUF model of an architecture that `gguf_config` supports.

    `path`: its file, or any part of a split one. `metadata`: all keys of the first header as plain Python; lists of
    strings (the vocabulary) are None if `strings` is False. Tensors have transformers' names, order of rows and numbers
    (Gemma's norms); the experts of a stack are tensors of their own. Rows are always a matrix's outputs.
    """

    format = "gguf"

    def __init__(self, path: str | Path, *, strings: bool = True) -> None:
        parts = [Path(path).with_name(name) for name in parts_of(Path(path).name)]
        self.path = parts[0]
        self.metadata: dict[str, Any] = {}
        self._entries: dict[str, _Entry] = {}
        self._config: dict[str, Any] | None = None
        self._kept: dict[str, NDArray[np.uint8]] = {}  # the last results of `_once`
        self._lock = threading.Lock()
        for number, part in enumerate(parts):
            metadata, entries = _read_part(part, number, len(parts), strings)
            twice = next((name for name in entries if name in self._entries), None)
            if twice is not None:
                raise ModelError(f"{part}: the tensor {twice!r} is in a part before it, too. Download the parts again.")
            self._entries |= entries
            self.metadata = self.metadata or metadata
        total = self.metadata.get("split.tensors.count", len(self._entries))
        if len(parts) > 1 and total != len(self._entries):
            raise ModelError(f"{self.path}: {total} tensors in all are announced, its {len(parts)} parts have "
                             f"{len(self._entries)}. Download the parts again.")  # fmt: skip

    @property
    def config(self) -> dict[str, Any]:
        """Equivalent of config.json. Unsupported for an unknown architecture."""
        if self._config is None:
            shapes = {name: entry.shape for name, entry in self._entries.items()}
            self._config = gguf_config.config_of(self.metadata, shapes, dict(self._factors()), str(self.path))
        return self._config

    def _factors(self) -> Iterator[tuple[str, list[float]]]:
        """Return the content of the tensors that are part of the configuration, by name."""
        for name in self._kind.factors:
            entry = self._entries.get(name)
            if entry is not None and entry.kind != "F32":
                raise ModelError(f"{self.path}: {name!r} is stored as {entry.kind}, not as F32.")
            if entry is not None:
                yield name, self._bytes(entry).view(np.float32).ravel().tolist()

    def names(self) -> Iterator[str]:
        """Return the names of all tensors, except rotary factors, which `config` holds.

        A tensor without a name in transformers keeps the file's name.
        """
        for stored, entry in self._entries.items():
            name = self._kind.theirs(stored) or stored
            if "ffn_gate_exps" in stored and name.endswith(self._kind.joined or "\0"):
                continue  # a part of the tensor of "ffn_up_exps"
            if stored in self._kind.factors or self._guesses(stored):
                continue
            yield from (name.replace("{}", str(i)) for i in range(entry.shape[0])) if "{}" in name else (name,)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor, from the header; None if there is no tensor of this name.

        A missing bias counts as a bias of zeros if other layers or products have theirs.
        """
        entry, index = self._find(name)
        if entry is None:
            return self._left_out(name)
        shape = entry.shape if index is None else entry.shape[1:]
        if name.endswith(self._kind.joined or "\0"):
            return shape[0], 2 * shape[1], *shape[2:]
        return (1, *shape) if name.endswith(_ONE_ROW) and len(shape) == 1 else shape

    def nbytes(self, name: str) -> int:
        """Return the size of a tensor in the file, in bytes."""
        entry, index = self._find(name)
        return 0 if entry is None else entry.nbytes // (1 if index is None else entry.shape[0])

    def __getitem__(self, name: str) -> Stored:
        """Return the tensor. ModelError if there is no tensor of this name, or if its type is not supported."""
        (entry, index), absent = self._find(name), self._left_out(name)
        if entry is None and absent is not None:
            return Stored(name, "F32", absent, np.zeros((*absent, 4), np.uint8))
        if entry is None:
            raise ModelError(f"{self.path} has no tensor {self._stored_name(name)!r} ({name}).")
        if entry.kind not in BLOCKS:
            known = ", ".join(k for k in BLOCKS if not re.fullmatch(r"I\d+", k))
            raise ModelError(f"{self.path}: {self._stored_name(name)!r} is stored as {entry.kind}. Readable: {known}.")
        if name.endswith(self._kind.joined or "\0"):
            return self._joined(name, entry)
        stored = Stored(name, entry.kind, entry.shape, self._bytes(entry)).at(index)
        return self._as_transformers(stored)

    def _joined(self, name: str, up: _Entry) -> Stored:
        """Return gate and up of all experts, which transformers stores in one tensor."""
        own, alternate = self._stored_name(name), self._kind.alternate
        gate = self._entries.get(own.replace("ffn_up_exps", "ffn_gate_exps"))
        if gate is None or (gate.kind, gate.shape) != (up.kind, up.shape):
            raise ModelError(f"{self.path}: {own!r} and its gate are not of one shape and type.")
        data = self._once(name, lambda: joined(self._bytes(gate), self._bytes(up), up.shape[1], alternate))
        return Stored(name, up.kind, (up.shape[0], 2 * up.shape[1], *up.shape[2:]), data)

    def _once(self, name: str, make: Callable[[], NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Return rows in another order than the file's. The last ones are kept, as they are read piece by piece."""
        with self._lock:
            if name not in self._kept:
                while len(self._kept) >= _KEPT:
                    del self._kept[next(iter(self._kept))]
                self._kept[name] = make()
            return self._kept[name]

    def _as_transformers(self, stored: Stored) -> Stored:
        """Return a tensor of the file with the order of rows and the numbers that transformers' files have."""
        name, kind, data = stored.name, stored.kind, stored.data
        which = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if which and self._kind.pairs:
            data = halves(data, int(self.config[which]), name)
        if self._kind.by_head and name.split(".")[-2] == "query_key_value":
            heads, kv = (int(self.config[self._kind.renamed.get(field, field)]) for field in (_HEADS, _KV_HEADS))
            data = self._once(name, lambda: by_head(data, heads, kv, name))
        if self._kind.above_one and name.endswith("norm.weight") and kind == "F32":
            data = (data.view(np.float32) - np.float32(1)).view(np.uint8)
        if name.endswith(_ONE_ROW) and len(stored.shape) == 1:
            return Stored(name, kind, (1, *stored.shape), data.reshape(1, -1))
        return Stored(name, kind, stored.shape, data)

    def _guesses(self, stored: str) -> bool:
        """Return True for a tensor of the layers that guess tokens beyond the next one, which are not computed."""
        layers = self.metadata.get(f"{self.metadata.get('general.architecture')}.nextn_predict_layers")
        match = re.match(r"blk\.(\d+)\.", stored)
        return bool(layers and match and int(match[1]) >= self.config["num_hidden_layers"])

    @property
    def _kind(self) -> Architecture:
        return ARCHITECTURES.get(architecture_of(self.metadata, self._entries), _UNKNOWN)

    def _stored_name(self, name: str) -> str:
        """Return the file's name of a tensor."""
        found = self._kind.ours(name)
        return found.name if found else name

    def _find(self, name: str) -> tuple[_Entry | None, int | None]:
        """Return the tensor that holds the one of transformers' name `name`, and its index there."""
        found = self._kind.ours(name)
        entry = self._entries.get(found.name) if found else None
        if found is None or entry is None:
            return self._entries.get(name), None
        if found.index is not None and (len(entry.shape) < 2 or found.index >= entry.shape[0]):
            return None, None
        return entry, found.index

    def _left_out(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a missing bias if the file has other biases of attention or feed-forward, else None.

        llama.cpp adds no bias there.
        """
        match = re.fullmatch(r"(blk\.\d+\.(attn|ffn)_(?!.*norm)\w+)\.bias", self._stored_name(name))
        weight = self._entries.get(f"{match[1]}.weight") if match else None
        if match is None or weight is None or not gguf_config.has_bias(self._entries, match[2]):
            return None
        return None if match[0] in self._entries else weight.shape[:1]

    def _bytes(self, entry: _Entry) -> NDArray[np.uint8]:
        raw = entry.mapped[entry.start : entry.start + entry.nbytes]
        return raw.reshape(entry.shape[0] if entry.shape else 1, -1) if entry.nbytes else raw.reshape(0, 0)
