"""Read GGUF files: metadata, and tensors under transformers' names as raw rows of the memory-mapped file.

A split model consists of several such files, the first of which holds the model's metadata.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmill.errors import ModelError
from tokenmill.weights import gguf_config
from tokenmill.weights.checkpoint import Stored
from tokenmill.weights.choice import parts_of
from tokenmill.weights.gguf_architecture import Architecture, Made
from tokenmill.weights.gguf_architectures import ARCHITECTURES, architecture_of
from tokenmill.weights.gguf_header import BLOCKS, INDEXED, Entry, read_part
from tokenmill.weights.gguf_rows import by_head, halves, joined

_log = logging.getLogger(__name__)
_HEADS, _KV_HEADS = "num_attention_heads", "num_key_value_heads"
_BOTH = ".ffn_gate_up_exps.weight"  # gate and up of each expert, one below the other
_ONE_ROW = "shared_expert_gate.weight"  # a vector in the file, a matrix of one row in transformers
_KEPT = 4  # reordered tensors: those of a layer
_NO_DATA = np.zeros((0, 0), np.uint8)
_UNKNOWN = Architecture("", {})


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
        self._entries: dict[str, Entry] = {}
        self._config: dict[str, Any] | None = None
        self._kept: dict[str, NDArray[np.uint8]] = {}  # the last results of `_once`
        self._lock = threading.Lock()
        for number, part in enumerate(parts):
            metadata, entries = read_part(part, number, len(parts), strings)
            twice = next((name for name in entries if name in self._entries), None)
            if twice is not None:
                raise ModelError(f"{part}: the tensor {twice!r} is in a part before it, too. Download the parts again.")
            self._entries |= entries
            self.metadata = self.metadata or metadata
        self._entries |= {name: _halved(entry) for name, entry in self._entries.items() if name.endswith(_BOTH)}
        indexed = sorted({entry.kind for entry in self._entries.values()} & INDEXED)
        if indexed:
            _log.info("%s has tensors of %s, whose numbers are kept as codes of 8 bits.", self.path, ", ".join(indexed))
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
        made = dict(self._made_names())
        yield from made
        parts = {part for found in made.values() for part in found}
        for stored, entry in self._entries.items():
            if pair := self._kind.theirs_of_both(stored):
                yield from (pair[i % 2].replace("{}", str(i // 2)) for i in range(entry.shape[0]))
                continue
            name = self._kind.theirs(stored) or stored
            if "ffn_gate" in stored and name.endswith(self._kind.joined or "\0"):
                continue  # a part of the tensor of "ffn_up"
            if stored in parts or stored in self._kind.factors or self._guesses(stored):
                continue
            yield from (name.replace("{}", str(i)) for i in range(entry.shape[0])) if "{}" in name else (name,)

    def _made_names(self) -> Iterator[tuple[str, list[str]]]:
        """Return the tensors that are made of others, with the file's names of these."""
        for name, made in self._kind.made.items():
            for layer in range(made.copies(self.config) if made.copies else self.config["num_hidden_layers"]):
                parts = made.names(layer)
                if all(part in self._entries for part in parts):
                    yield name.replace("{}", str(layer)), parts

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor, from the header; None if there is no tensor of this name.

        A missing bias counts as a bias of zeros if other layers or products have theirs.
        """
        if (found := self._parts(name)) is not None:
            return self._made_shape(name, *found)
        entry, index = self._find(name)
        if entry is None:
            return self._left_out(name)
        shape = entry.shape if index is None else entry.shape[1:]
        if name.endswith(self._kind.joined or "\0"):
            rows = len(shape) - (1 if self._stored_name(name).endswith(".bias") else 2)
            return *shape[:rows], 2 * shape[rows], *shape[rows + 1 :]
        if name.endswith(self._kind.below or "\0"):
            return _below(shape)
        return (1, *shape) if name.endswith(_ONE_ROW) and len(shape) == 1 else shape

    def nbytes(self, name: str) -> int:
        """Return the size of a tensor in the file, in bytes."""
        if (found := self._parts(name)) is not None:
            return sum(part.nbytes for part in found[2])
        entry, index = self._find(name)
        return 0 if entry is None else entry.nbytes // (1 if index is None else entry.shape[0])

    def __getitem__(self, name: str) -> Stored:
        """Return the tensor. ModelError if there is no tensor of this name, or if its type is not supported."""
        if (found := self._parts(name)) is not None:
            return self._make(name, *found)
        (entry, index), absent = self._find(name), self._left_out(name)
        if entry is None and absent is not None:
            return Stored(name, "F32", absent, np.zeros((*absent, 4), np.uint8))
        if entry is None:
            raise ModelError(f"{self.path} has no tensor {self._stored_name(name)!r} ({name}).")
        self._check_type(entry, self._stored_name(name))
        if name.endswith(self._kind.joined or "\0"):
            return self._joined(name, entry)
        stored = Stored(name, entry.kind, entry.shape, self._bytes(entry)).at(index)
        return self._as_transformers(stored)

    def _check_type(self, entry: Entry, name: str) -> None:
        if entry.kind not in BLOCKS:
            known = ", ".join(k for k in BLOCKS if not re.fullmatch(r"I\d+", k))
            raise ModelError(f"{self.path}: {name!r} is stored as {entry.kind}. Readable: {known}.")

    def _parts(self, name: str) -> tuple[Made, int, list[Entry]] | None:
        """Return what a tensor is made of: how, its layer, and the parts; None if the file has it as it is."""
        made, layer = self._kind.made_of(name) or (None, 0)
        if made is None:
            return None
        parts = [self._entries.get(part) for part in made.names(layer)]
        found = [part for part in parts if part is not None]
        return (made, layer, found) if len(found) == len(parts) else None

    def _made_shape(self, name: str, made: Made, layer: int, entries: list[Entry]) -> tuple[int, ...]:
        """Return the shape of a tensor that is made of others. ModelError if they do not fit."""
        shapes = [entry.shape for entry in entries]
        try:
            shape = made.shape(self.config, shapes)
        except ValueError as error:
            names = ", ".join(map(repr, made.names(layer)))
            raise ModelError(f"{self.path}: {names} have shapes {shapes}; {error}.") from None
        if made.rows is None:
            return shape
        shared = sum(other.sources == made.sources for other in self._kind.made.values())  # by so many in equal parts
        rows = len(made.rows(self.config))
        return (rows if rows * shared == shape[0] else -(-shape[0] // shared), *shape[1:])

    def _make(self, name: str, made: Made, layer: int, entries: list[Entry]) -> Stored:
        parts = []
        for source, entry in zip(made.sources, entries, strict=True):
            self._check_type(entry, source)
            parts.append(Stored(source, entry.kind, entry.shape, self._bytes(entry)))
        shape, fields = self.shape(name) or (), self.config
        if made.rows is not None:
            rows = made.rows(fields)
            return self._as_transformers(Stored(name, parts[0].kind, shape, parts[0].data[rows]))
        compute = made.numbers
        assert compute is not None
        return Stored(name, "F32", shape, _NO_DATA, tuple(parts), lambda arrays: compute(fields, arrays, layer))

    def _joined(self, name: str, up: Entry) -> Stored:
        """Return gate and up, of all experts if they are stacked, which transformers stores in one tensor."""
        own, alternate = self._stored_name(name), self._kind.alternate
        gate = self._entries.get(own.replace("ffn_up", "ffn_gate"))
        if gate is None or (gate.kind, gate.shape) != (up.kind, up.shape):
            raise ModelError(f"{self.path}: {own!r} and its gate are not of one shape and type.")
        stacked = up.shape if len(up.shape) > 2 or own.endswith(".bias") else (1, *up.shape)
        first, second = (self._bytes(entry).reshape(stacked[0], -1) for entry in (gate, up))
        data = self._once(name, lambda: joined(first, second, stacked[1], alternate))
        shape = self.shape(name) or ()
        return Stored(name, up.kind, shape, data.reshape(shape[0], -1))

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
        if self._kind.above_one and name.endswith("norm.weight") and not name.endswith(self._kind.as_stored or "\0"):
            return Stored(name, "F32", stored.shape, _NO_DATA, (stored,), lambda arrays: arrays[0] - np.float32(1))
        if name.endswith(self._kind.below or "\0"):
            shape = _below(stored.shape)
            return Stored(name, kind, shape, data.reshape(shape[0], -1))
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

    def _find(self, name: str) -> tuple[Entry | None, int | None]:
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

    def _bytes(self, entry: Entry) -> NDArray[np.uint8]:
        raw = entry.mapped[entry.start : entry.start + entry.nbytes]
        return raw.reshape(entry.shape[0] if entry.shape else 1, -1) if entry.nbytes else raw.reshape(0, 0)


def _halved(entry: Entry) -> Entry:
    """Return a stack of two matrices for each expert as a stack of matrices."""
    if len(entry.shape) != 3 or entry.shape[1] % 2:
        return entry
    experts, rows, columns = entry.shape
    return replace(entry, shape=(2 * experts, rows // 2, columns))


def _below(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a stack of matrices that lie below each other."""
    return (shape[0] * shape[1], *shape[2:]) if len(shape) > 2 else shape
