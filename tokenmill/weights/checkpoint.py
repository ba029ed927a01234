"""Read checkpoints: named tensors as raw rows of a memory-mapped file, without copies and without torch.

`Safetensors` reads a folder of .safetensors files with config.json; `gguf.Gguf` reads a GGUF file. Files are untrusted:
sizes, offsets and names in a header are checked against the file before use.
"""

from __future__ import annotations

import contextlib
import json
import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from tokenmill import jsontext
from tokenmill.errors import ModelError
from tokenmill.weights import fused
from tokenmill.weights.choice import indexed_files
from tokenmill.weights.source import ModelSource, read_json, refuse_pointer, unreadable, weights_in
from tokenmill.weights.tensor_names import read_name

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_MAX_HEADER = 100 << 20  # the format's own limit
_MAX_DIMS = 8
_LANGUAGE_PARTS = ("text_config", "llm_config", "thinker_config")
"""Fields of a multimodal model's config.json that describe the language part."""
_LANGUAGE_PREFIXES = (
    "language_model.", "model.language_model.", "text_model.", "model.text_model.", "thinker.",
)  # fmt: skip
"""Prefixes of the language model's tensors in multimodal models, as transformers' versions have written them."""


_BODIES = {
    "embed_tokens.weight": "model.", "decoder.embed_tokens.weight": "model.", "wte.weight": "transformer.",
    "word_embeddings.weight": "transformer.", "embed_in.weight": "gpt_neox.",
}  # fmt: skip
"""Embedding of a model that was saved without its output layer -> prefix of its tensors in the whole model."""

QUANTIZATION_FILES = {
    "quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt",
}  # fmt: skip
"""File in which programs describe a quantization that config.json does not -> its method, if the file names none.

The content becomes a field of the configuration, under the file's name.
"""

_HEADS = ("lm_head.", "embed_out.")
"""Prefixes of output layers, which lie beside the rest of a model."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Tensor in the form that the file stores.

    `data`: (rows, bytes per row), read-only, a view of the mapped file if possible. A vector has one element per row.
    `numbers`: function that computes the tensor from the numbers of `parts`, for one that is made of other tensors;
    `data` is empty then.
    """

    name: str
    kind: str  # "F32", "BF16", "Q4_K", …
    shape: tuple[int, ...]
    data: NDArray[np.uint8]
    parts: tuple[Stored, ...] = ()
    numbers: Callable[[Sequence[NDArray[np.float32]]], NDArray[np.float32]] | None = None

    def at(self, index: int | None, below: int = 0) -> Stored:
        """Return the matrix or vector `index` of a tensor that stacks several; None: the tensor itself.

        `below`: number of matrices that lie below each other; 0: the tensor has an axis for them.
        """
        if index is None:
            return self
        if below:
            each = self.shape[0] // below
            part = self.data[index * each : (index + 1) * each]
            return Stored(self.name, self.kind, (each, *self.shape[1:]), part)
        size, shape = prod(self.shape[1:-1]), self.shape[1:]
        rows = self.data.reshape(self.shape[0] * size, -1)[index * size : (index + 1) * size]
        return Stored(self.name, self.kind, shape, rows.reshape(shape[0], -1))


class Checkpoint(Protocol):
    """Checkpoint: tensors by transformers' names, and the model's config.json or its equivalent."""

    @property
    def config(self) -> dict[str, Any]:
        """Content of config.json."""

    @property
    def format(self) -> str:
        """File format, as in `ModelSource`."""

    def names(self) -> Iterator[str]:
        """Return the names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor, from the header; None if there is no tensor of this name."""

    def nbytes(self, name: str) -> int:
        """Return the size of a tensor in the file, in bytes."""

    def __getitem__(self, name: str) -> Stored:
        """Return the tensor. ModelError if there is no tensor of this name."""


def open_checkpoint(source: ModelSource) -> Checkpoint:
    """Open a checkpoint of either format and check its headers; reads no tensor. ModelError if a file is invalid."""
    if source.adapter:
        from tokenmill.weights.adapter import Merged  # here, because adapter.py imports this file

        return Merged(open_checkpoint(msgspec.structs.replace(source, adapter="")), source.adapter)
    if source.format == "gguf":
        from tokenmill.weights.gguf import Gguf  # here, because gguf.py imports this file

        return Gguf(source.path, strings=False)
    return Safetensors(source.path)


def model_config(source: ModelSource) -> dict[str, Any]:
    """Read config.json, or derive its equivalent from a GGUF file's metadata."""
    if source.format == "gguf" or source.adapter:
        return open_checkpoint(source).config
    return read_json(Path(source.path) / "config.json")


def language_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the object of config.json that describes a model's language part; `config` if it has no other part."""
    return language_path(config)[-1]


def language_path(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the objects of config.json from the whole model's to that of its language part."""
    for name in _LANGUAGE_PARTS:
        nested = config.get(name)
        if isinstance(nested, dict) and isinstance(nested.get("model_type"), str):
            return [config, *language_path(nested)]
    return [config]


def map_file(path: Path) -> NDArray[np.uint8]:
    """Map a file read-only, as bytes. ModelError with the remedy if it is unreadable, empty, or a Git LFS pointer."""
    refuse_pointer(path)
    try:
        return np.memmap(path, np.uint8, "r")
    except FileNotFoundError:
        raise ModelError(f"{path} is missing.") from None
    except OSError as e:
        raise unreadable(path, e) from None
    except ValueError:
        raise ModelError(f"{path} is empty. Download the file again.") from None


def read_ahead(rows: NDArray[np.generic]) -> tuple[int, int] | None:
    """Advise the system to read a mapped file's pages that are not in memory, and return their bytes: (first, end).

    Returns at once; None if the rows are not of a mapped file. Without the advice, each missing page is read when a
    thread touches it, and the thread waits.
    """
    found = within_file(rows)
    if found is None:
        return None
    mapped, first = found
    start = first // mmap.PAGESIZE * mmap.PAGESIZE
    with contextlib.suppress(OSError):  # it is advice
        mapped.madvise(mmap.MADV_WILLNEED, start, first + rows.nbytes - start)
    return first, first + rows.nbytes


def within_file(rows: NDArray[np.generic]) -> tuple[mmap.mmap, int] | None:
    """Return the mapped file that rows are a view of, and their first byte in it; None if they are no such view."""
    base: object = rows
    while isinstance(base, np.ndarray):
        base = base.base
    if not isinstance(base, mmap.mmap) or not rows.nbytes:
        return None
    return base, rows.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data


@dataclass(frozen=True, slots=True)
class _Entry:
    kind: str
    shape: tuple[int, ...]
    mapped: NDArray[np.uint8]
    start: int
    stop: int
    turned: tuple[int, int, int] | None = None  # as in `fused.Part`

    @property
    def nbytes(self) -> int:
        """Number of bytes of the tensor."""
        return prod(self.shape) * ITEM_BYTES[self.kind]

    def part(self, part: fused.Part) -> _Entry:
        """Return a tensor within this one."""
        item = ITEM_BYTES[self.kind]
        size = prod(part.turned[:2]) if part.turned else prod(part.shape)
        start = self.start + part.start * item
        return _Entry(self.kind, part.shape, self.mapped, start, start + size * item, part.turned)

    def rows(self) -> NDArray[np.uint8]:
        """Return the tensor as rows of bytes: a view of the file, or a copy if it is stored transposed."""
        found = self.mapped[self.start : self.stop]
        if self.turned is not None:
            rows, columns, first = self.turned
            matrix = found.reshape(rows, columns, -1)[:, first : first + self.shape[0]]
            return np.ascontiguousarray(matrix.transpose(1, 0, 2)).reshape(self.shape[0], -1)
        count = self.shape[0] if self.shape else 1
        return found.reshape(count, -1) if count else found[:0].reshape(0, 0)


class Safetensors:
    """Checkpoint in a folder: one .safetensors file, or several with an index.

    A tensor that the index lists but its file lacks raises ModelError on access, not on opening.
    """

    format = "safetensors"

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = read_json(self.folder / "config.json")
        for name in QUANTIZATION_FILES:
            if (self.folder / name).is_file():
                self.config[name] = read_json(self.folder / name)
        self._entries: dict[str, _Entry] = {}
        weights = weights_in(self.folder)
        if weights.format != "safetensors":
            raise ModelError(f"{self.folder} has no .safetensors files that are a model's weights.")
        for path in (self.folder / name for name in weights.files):
            for name, entry in read_header(path).items():
                if name in self._entries:
                    raise ModelError(
                        f"{path}: the tensor {name!r} is in another file of {self.folder} too. Keep one set of files, "
                        "with its index."
                    )
                self._entries[name] = entry
        listed = indexed_files(read_json(self.folder / weights.index), weights.index) if weights.index else {}
        self._lost = {
            name: file for name, file in listed.items() if name not in self._entries and name != "lm_head.weight"
        }
        self._refuse_mistral()
        for embedding, prefix in _BODIES.items():
            if embedding in self._entries and not any(name.startswith(prefix) for name in self._entries):
                self._rename(partial(_of_whole_model, prefix=prefix))
        prefixed = any(name.startswith(_LANGUAGE_PREFIXES) for name in self._entries)
        part = language_config(self.config)
        if prefixed and part is not self.config:
            self._rename(_of_language_part)
        self._divide(str(part.get("model_type")))

    def _rename(self, rule: Callable[[str], str]) -> None:
        """Rename all tensors. Those whose new name is empty belong to another part of the model, and are left out."""
        self._entries = {new: entry for name, entry in self._entries.items() if (new := rule(name))}
        self._lost = {new: file for name, file in self._lost.items() if (new := rule(name))}

    def _divide(self, model_type: str) -> None:
        """Divide tensors of all experts of a layer into those of each, and rename all as the models read them."""
        self._rename(partial(read_name, model_type=model_type))
        shapes, whole = {name: entry.shape for name, entry in self._entries.items()}, self._entries
        self._entries = {}
        for name, entry in whole.items():
            parts = {part.name: entry.part(part) for part in fused.parts_of(name, shapes, model_type)}
            self._entries |= parts or {name: entry}
        self._rename(partial(read_name, model_type=model_type))

    def _refuse_mistral(self) -> None:
        if "tok_embeddings.weight" in self._entries:
            raise ModelError(
                f"{self.folder} has its weights under the names of Mistral's or Meta's own format (consolidated "
                "files). Use the model's files for transformers: model.safetensors, or its parts and their index."
            )

    def names(self) -> Iterator[str]:
        """Return the names of all tensors."""
        return iter(self._entries)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor, from the header; None if there is no tensor of this name."""
        entry = self._entries.get(name)
        if name in self._lost:
            raise self._missing(name)
        return None if entry is None else entry.shape

    def nbytes(self, name: str) -> int:
        """Return the size of a tensor in the file, in bytes."""
        return self._entries[name].nbytes

    def __getitem__(self, name: str) -> Stored:
        """Return the tensor. ModelError if there is no tensor of this name."""
        entry = self._entries.get(name)
        if entry is None:
            raise self._missing(name)
        return Stored(name, entry.kind, entry.shape, entry.rows())

    def _missing(self, name: str) -> ModelError:
        file = self._lost.get(name)
        if file is None:
            return ModelError(f"{self.folder} has no tensor {name!r}.")
        return ModelError(
            f"{self.folder / file} lacks the tensor {name!r} that the index says it holds. Download the file and the "
            "index again."
        )


def _of_whole_model(name: str, prefix: str = "model.") -> str:
    """Return the full model's name of a tensor from a checkpoint that was saved without the output layer."""
    return name if name.startswith(_HEADS) else f"{prefix}{name}"


def _of_language_part(name: str) -> str:
    """Return the language model's name of a multimodal model's tensor; "" if it belongs to another part."""
    prefix = next((prefix for prefix in _LANGUAGE_PREFIXES if name.startswith(prefix)), "")
    if not prefix:
        return name if name.startswith("lm_head.") else ""
    own = name.removeprefix(prefix)
    if own.startswith(_LANGUAGE_PREFIXES):
        return _of_language_part(own)
    return own if own.startswith("model.") else _of_whole_model(own)


def read_header(path: Path) -> dict[str, _Entry]:
    """Read the header of a .safetensors file: its tensors by name, checked to lie within the file without overlap."""
    mapped = map_file(path)
    if len(mapped) < 8:
        raise ModelError(f"{path} is cut off: {len(mapped)} bytes are no safetensors file. Download the file again.")
    length, room = int.from_bytes(mapped[:8].tobytes(), "little"), len(mapped) - 8
    if length > min(room, _MAX_HEADER):
        raise ModelError(
            f"{path} is cut off or no safetensors file: a header of {length} bytes, {room} are there. Download the "
            "file again."
        )
    try:
        header = json.loads(mapped[8 : 8 + length].tobytes())
    except (ValueError, RecursionError):
        why = jsontext.fault(mapped[8 : 8 + length].tobytes()) or "it cannot be read"
        raise ModelError(f"{path} has an unreadable header: {why}. Download the file again.") from None
    if not isinstance(header, dict):
        raise ModelError(f"{path} has an unreadable header: not a JSON object. Download the file again.")
    entries = {
        name: _entry(path, name, info, mapped, 8 + length) for name, info in header.items() if name != "__metadata__"
    }
    _refuse_overlaps(path, entries)
    return entries


def _entry(path: Path, name: str, info: Any, mapped: NDArray[np.uint8], base: int) -> _Entry:
    def bad(why: str) -> ModelError:
        return ModelError(f"{path}: the header's entry of {name!r} is wrong: {why}.")

    if not isinstance(info, dict):
        raise bad("not an object")
    kind, shape, offsets = info.get("dtype"), _sizes(info.get("shape")), _sizes(info.get("data_offsets"))
    if not isinstance(kind, str) or kind not in ITEM_BYTES:
        raise bad(f"dtype {kind!r} is unknown")
    if shape is None or len(shape) > _MAX_DIMS:
        raise bad(f"shape {info.get('shape')!r}")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad(f"data_offsets {info.get('data_offsets')!r}")
    start, stop = offsets[0] + base, offsets[1] + base
    if stop > len(mapped):
        raise bad(f"it ends at byte {stop}, the file at {len(mapped)}; the file is cut off, download it again")
    if prod(shape) * ITEM_BYTES[kind] != stop - start:
        raise bad(f"{stop - start} bytes do not hold {shape} of {kind}")
    return _Entry(kind, tuple(shape), mapped, start, stop)


def _sizes(value: Any) -> list[int] | None:
    """Return `value` if it is a list of sizes, else None."""
    if isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value):
        return value
    return None


def _refuse_overlaps(path: Path, entries: dict[str, _Entry]) -> None:
    end, before = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start < end and entry.stop > entry.start:
            raise ModelError(f"{path}: the tensors {before!r} and {name!r} overlap.")
        if entry.stop > end:
            end, before = entry.stop, name
