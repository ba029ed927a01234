"""Merge a PEFT adapter (LoRA, DoRA) into the weights of its base model while they are read. No file is written.

The merged tensor is W + scaling · B·A, in the type that the base's file has, as peft's `merge_and_unload` computes it.
Whole tensors of the adapter (trained biases, `modules_to_save`) replace the base's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmill.errors import ModelError, Unsupported
from tokenmill.weights.adapter_config import refuse_other_kinds
from tokenmill.weights.checkpoint import Checkpoint, Stored, read_header
from tokenmill.weights.choice import ADAPTER_CONFIG, ADAPTER_MODEL
from tokenmill.weights.source import read_json

Floats = NDArray[np.float32]

_PREFIX = "base_model.model."
_LOW_RANK = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))(?:\.default)?(?:\.weight)?"
)
_COPIED = re.compile(r"\.(modules_to_save|base_layer)(\.default)?(?=\.)")
_HEAD, _TABLE = "lm_head.weight", "model.embed_tokens.weight"


class Merged:
    """Checkpoint of a base model with an adapter merged into it. `folder`: the adapter's files.

    Raises ModelError or Unsupported if the adapter is of another kind, or has tensors for which the base has none.
    """

    def __init__(self, base: Checkpoint, folder: str | Path) -> None:
        self.base, self.folder = base, Path(folder)
        self.about = read_json(self.folder / ADAPTER_CONFIG)
        refuse_other_kinds(self.folder, self.about)
        self._replaced: dict[str, Stored] = {}
        self._low_rank: dict[str, dict[str, Floats]] = {}  # by name of the base's tensor: A, B and a magnitude
        for name, stored in self._tensors():
            self._sort(name, stored)
        for name, parts in self._low_rank.items():
            self._check(name, parts)

    @property
    def format(self) -> str:
        """Format of the base."""
        return self.base.format

    @property
    def config(self) -> dict[str, Any]:
        """The base's config.json, with the adapter's size of the vocabulary, and its output layer untied."""
        config = dict(self.base.config)
        if _TABLE in self._replaced:
            config["vocab_size"] = self._replaced[_TABLE].shape[0]
        if _HEAD in self._replaced and config.get("tie_word_embeddings"):
            config["tie_word_embeddings"] = False
        return config

    def names(self) -> Iterator[str]:
        """Return the names of all tensors."""
        yield from self.base.names()
        yield from (name for name in self._replaced if self.base.shape(name) is None)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor; None if there is no tensor of this name."""
        return self._replaced[name].shape if name in self._replaced else self.base.shape(name)

    def nbytes(self, name: str) -> int:
        """Return the size of a tensor in its file, in bytes."""
        return self._replaced[name].data.nbytes if name in self._replaced else self.base.nbytes(name)

    def __getitem__(self, name: str) -> Stored:
        """Return the merged tensor. ModelError if there is no tensor of this name."""
        stored, parts = self._replaced.get(name) or self.base[name], self._low_rank.get(name)
        if parts is None:
            return stored
        merged = _floats(stored) + self._delta(name, parts)
        if "magnitude_vector" in parts:
            along = 0 if self.about.get("fan_in_fan_out") else 1
            length = np.linalg.norm(merged, axis=along, keepdims=True)
            merged = merged * (parts["magnitude_vector"].reshape(length.shape) / length)
        return Stored(name, stored.kind, stored.shape, _bytes(merged, stored.kind))

    def _tensors(self) -> Iterator[tuple[str, Stored]]:
        path = self.folder / ADAPTER_MODEL
        for name, entry in read_header(path).items():
            if entry.kind not in _TO_FLOATS:
                raise Unsupported("type of an adapter's weights", entry.kind, _TO_FLOATS, f"{path}: {name!r}.")
            rows = entry.shape[0] if entry.shape else 1
            yield name, Stored(name, entry.kind, entry.shape, entry.mapped[entry.start : entry.stop].reshape(rows, -1))

    def _sort(self, name: str, stored: Stored) -> None:
        """Record one tensor of the adapter under the name of the base's tensor that it changes."""
        own = _COPIED.sub("", name.removeprefix(_PREFIX))
        match = _LOW_RANK.fullmatch(own)
        if match:
            place = self._in_base(f"{match['module']}.weight", name)
            self._low_rank.setdefault(place, {})[match["part"].removeprefix("lora_")] = _floats(stored)
        elif "lora" in own or not own.endswith((".weight", ".bias")):
            raise Unsupported("tensor of an adapter", name, (), "Merge it with peft (`merge_and_unload`) first.")
        else:
            place = _HEAD if own == _HEAD else self._in_base(own, name)
            self._replaced[place] = Stored(place, stored.kind, stored.shape, stored.data)

    def _in_base(self, wanted: str, name: str) -> str:
        """Return the base's name of a tensor, which may lack the prefix of a multimodal model."""
        parts = wanted.split(".")
        for start in range(min(3, len(parts))):
            for prefix in ("", "model."):
                found = prefix + ".".join(parts[start:])
                if self.base.shape(found) is not None:
                    return found
        tied = " Its output layer is its embedding: merge the adapter with peft first." if wanted == _HEAD else ""
        raise ModelError(
            f"{self.folder}: the adapter changes {wanted!r} (by {name!r}), which its base model does not have.{tied} "
            f"Check base_model_name_or_path in {ADAPTER_CONFIG}."
        )

    def _check(self, name: str, parts: Mapping[str, Floats]) -> None:
        """Raise ModelError if the parts of one change do not fit each other and the base's tensor."""
        pair = next((ends for ends in (("A", "B"), ("embedding_A", "embedding_B")) if set(ends) <= parts.keys()), None)
        shape = self.shape(name) or ()
        if pair is None or len(shape) != 2 or any(parts[end].ndim != 2 for end in pair):
            raise ModelError(f"{self.folder}: the adapter's change of {name!r} lacks one of its two matrices.")
        a, b = (parts[end].shape for end in pair)
        turned = pair == ("embedding_A", "embedding_B") or bool(self.about.get("fan_in_fan_out"))
        made = (a[1], b[0]) if turned else (b[0], a[1])
        if a[0] != b[1] or made != shape:
            raise ModelError(
                f"{self.folder}: the adapter's matrices for {name!r} have shapes {a} and {b}, the base's tensor "
                f"{shape}. Check base_model_name_or_path in {ADAPTER_CONFIG}."
            )
        if "embedding_A" in pair and "magnitude_vector" in parts:
            raise Unsupported(
                "tensor of an adapter", f"lora_magnitude_vector of {name}", (), "Merge it with peft first."
            )
        kind = (self._replaced.get(name) or self.base[name]).kind
        if kind not in _TO_FLOATS:
            raise Unsupported(
                "type of a base model's weights", kind, _TO_FLOATS, f"{name!r} is quantized, and an adapter is merged "
                "into unquantized weights. Give the adapter an unquantized base model."
            )  # fmt: skip

    def _delta(self, name: str, parts: Mapping[str, Floats]) -> Floats:
        scaling = self._scaling(name)
        if "embedding_A" in parts:
            return np.asarray((parts["embedding_B"] @ parts["embedding_A"]).T * scaling, np.float32)
        product = parts["B"] @ parts["A"]
        return np.asarray((product.T if self.about.get("fan_in_fan_out") else product) * scaling, np.float32)

    def _scaling(self, name: str) -> np.float32:
        module = name.removesuffix(".weight")
        rank = _by_pattern(self.about.get("rank_pattern"), module, self.about.get("r", 8))
        alpha = _by_pattern(self.about.get("alpha_pattern"), module, self.about.get("lora_alpha", 8))
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
            raise ModelError(f"{self.folder / ADAPTER_CONFIG}: r {rank!r}, lora_alpha {alpha!r} for {module!r}.")
        return np.float32(alpha / (sqrt(rank) if self.about.get("use_rslora") else rank))


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a module's name, as peft searches them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _bf16_to_floats(raw: NDArray[np.uint8]) -> Floats:
    return (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


_TO_FLOATS = {
    "F32": lambda raw: raw.view(np.float32),
    "F16": lambda raw: raw.view(np.float16).astype(np.float32),
    "BF16": _bf16_to_floats,
}


def _floats(stored: Stored) -> Floats:
    made: Floats = _TO_FLOATS[stored.kind](np.ascontiguousarray(stored.data))
    return made.reshape(stored.shape)


def _bytes(numbers: Floats, kind: str) -> NDArray[np.uint8]:
    """Return (rows, bytes of a row) of numbers in a type of the base's file, rounded to nearest."""
    rows = np.ascontiguousarray(numbers, np.float32).reshape(len(numbers), -1)
    if kind == "F16":
        return rows.astype(np.float16).view(np.uint8)
    if kind == "BF16":
        bits = rows.view(np.uint32)
        even = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
        return (even >> np.uint32(16)).astype(np.uint16).view(np.uint8)
    return rows.view(np.uint8)
