"""Read the keys of a GGUF file's architecture, and refuse those that would change the results unread."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from math import isfinite
from typing import Any

from tokenmill.errors import ModelError, Unsupported
from tokenmill.weights.gguf_architecture import Shape

_NOT_NUMBERS = ("vocab_size", "tensor_data_layout", "pooling_type", "rope.scaling.finetuned", "expert_used_count")
"""Keys of an architecture that do not change the results of a model."""

_OF_NUMBERS = re.compile(r"attention\.|rope\.|scale|softcap|parallel|norm|act(ivation)?$|expert")
"""Keys that may change the results, by llama.cpp's naming."""

_log = logging.getLogger(__name__)


class Reader:
    """Accessor of one architecture's keys that records which of them were read.

    `shapes`: shapes of all tensors, by the file's names. `zeros`: in lists by layer, 0 is for layers without the thing.
    `factors`: as in `gguf_config.config_of`.
    """

    def __init__(
        self,
        metadata: Mapping[str, Any],
        shapes: Mapping[str, Shape],
        path: str,
        *,
        zeros: bool = False,
        factors: Mapping[str, list[float]] | None = None,
    ) -> None:
        self.metadata, self.shapes, self.path, self._zeros = metadata, shapes, path, zeros
        self.factors = factors or {}
        self.architecture = str(metadata["general.architecture"])
        self._seen = set(_NOT_NUMBERS)

    def __call__(self, key: str, default: Any = None) -> Any:
        """Return the key's value, or the default; ModelError if there is neither."""
        self._seen.add(key)
        found = self.metadata.get(f"{self.architecture}.{key}", default)
        if found is None:
            raise ModelError(f"{self.path} lacks the key '{self.architecture}.{key}'.")
        return found

    def has(self, key: str) -> bool:
        """Return True if the file has the key."""
        return f"{self.architecture}.{key}" in self.metadata

    def number(self, key: str, default: int | None = None) -> int:
        """Return a positive integer. A list with one number per layer must hold the same number for each."""
        found = self(key, default)
        if isinstance(found, list):
            layers = self("block_count")
            if len(found) != layers:
                raise self._wrong(key, f"a list of {len(found)} numbers for {layers} layers")
            found = [n for n in found if n] if self._zeros else found
            if len(set(found)) != 1:
                raise Unsupported(
                    "GGUF model", f"{self.architecture}.{key} = {found}", (), "Layers have to be of one shape here."
                )
            found = found[0]
        if type(found) is not int or found < 1:
            raise self._wrong(key, f"{found!r}, not a whole number above 0")
        return found

    def count(self, key: str) -> int:
        """Return an integer of at least 0, which is 0 if the file lacks the key."""
        found = self(key, 0)
        if type(found) is not int or found < 0:
            raise self._wrong(key, f"{found!r}, not a whole number of at least 0")
        return found

    def real(self, key: str, default: float) -> float:
        """Return a finite number."""
        found = self(key, default)
        if isinstance(found, bool) or not isinstance(found, int | float) or not isfinite(found):
            raise self._wrong(key, f"{found!r}, not a finite number")
        return found

    def numbers_of_layers(self, key: str) -> list[float]:
        """Return a number for each layer, of a key whose name does not begin with the architecture's."""
        found, layers = self.metadata.get(key), self.number("block_count")
        if not isinstance(found, list) or len(found) != layers or not all(isinstance(n, float) for n in found):
            raise ModelError(f"{self.path}: {key!r} is {found!r}, not {layers} numbers, one for each layer.")
        return found

    def by_layer(self, key: str) -> list[int]:
        """Return a number of at least 0 for each layer."""
        found, layers = self(key), self.number("block_count")
        found = found if isinstance(found, list) else [found] * layers
        if len(found) != layers or any(type(n) is not int or n < 0 for n in found):
            raise self._wrong(key, f"{found!r}, not a whole number of at least 0 for each of {layers} layers")
        return found

    def ignore(self, *keys: str) -> None:
        """Count keys as read."""
        self._seen.update(keys)

    def has_tensor(self, pattern: str) -> bool:
        """Return True if the name of a tensor matches a regular expression."""
        return any(re.fullmatch(pattern, name) for name in self.shapes)

    def refuse_others(self) -> None:
        """Raise Unsupported for an unread key that may change the results; log any other unread key."""
        prefix, unknown = f"{self.architecture}.", []
        for name, value in self.metadata.items():
            key = name.removeprefix(prefix)
            if key == name or key in self._seen or _neutral(key, value):
                continue
            if _OF_NUMBERS.search(key):
                raise Unsupported(
                    "GGUF key", name, (), f"It is {value!r}, and the {self.architecture} model is computed without it. "
                    "Convert the model again from its original."
                )  # fmt: skip
            unknown.append(name)
        if unknown:
            _log.warning("%s has keys that are not known here, and not heeded: %s.", self.path, ", ".join(unknown))

    def _wrong(self, key: str, why: str) -> ModelError:
        return ModelError(f"{self.path}: '{self.architecture}.{key}' is {why}.")


def _neutral(key: str, value: Any) -> bool:
    """Return True for a value that does not change the results."""
    if key == "attention.causal":
        return value is True
    return value in (0, "", None) or (key.endswith(("scale", "factor")) and value == 1)
