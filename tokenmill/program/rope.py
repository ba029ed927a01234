"""Compute the frequencies of rotary position embeddings (RoPE) for each kind of scaling, from config.json.

There is no table of cosines by position: a step computes its cosines from its positions and the `rotary_dim / 2`
frequencies, so memory does not grow with the context length. (Scalings: linear, kaiokendev 2023; dynamic NTK, emozilla
2023; YaRN, arXiv:2309.00071; llama3, Meta's Llama 3.1 reference.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, inf, log, pi, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmill.errors import ModelError, Unsupported

Scaling = tuple[tuple[str, Any], ...]
Frequencies = NDArray[np.float64]
KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "factors")
_SAME_KINDS = {"su": "longrope", "deepseek_yarn": "yarn", "mrope": "default"}
"""Name of a scaling -> that used here. mrope differs from no scaling at positions in images only."""
_OF_IMAGES = ("mrope_section", "mrope_interleaved")


@dataclass(frozen=True, slots=True)
class RopeTable:
    """Parameters of a rotary embedding.

    `scaling`: config.json's object as sorted pairs, with lists as tuples, so that the struct is hashable.
    `interleaved`: adjacent columns are a pair; else column i and i + half of the rotary columns.
    """

    rotary_dim: int
    theta: float
    max_position: int
    scaling: Scaling = ()
    interleaved: bool = False

    @staticmethod
    def of(
        rotary_dim: int, theta: float, max_position: int, scaling: dict[str, Any] | None, interleaved: bool = False
    ) -> RopeTable:
        """Check the parameters and return the table. Unsupported: unknown scaling; ModelError: a number is missing."""
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in (scaling or {}).items()}
        kind = _kind_of(given)
        if kind not in KINDS:
            raise Unsupported("rope scaling", str(kind), KINDS)
        left_out = ("rope_type", "type", *_OF_IMAGES)
        kept = {k: v for k, v in given.items() if k not in left_out and (v is not None or k == "truncate")}
        pairs = ("rope_type", kind), *sorted(kept.items())
        table = RopeTable(rotary_dim, theta, max_position, pairs, interleaved)
        try:
            table.inverse_frequencies(), table.magnitude(), table.longest
            if table.moves:
                table.frequencies_at(np.zeros(1, np.int64))
        except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as e:
            raise ModelError(f"config.json: rope_scaling {scaling!r} is incomplete or wrong: {e!r}.") from e
        return table

    @property
    def kind(self) -> str:
        """Name of the scaling."""
        return str(dict(self.scaling).get("rope_type", "default"))

    @property
    def moves(self) -> bool:
        """True if the frequencies depend on the position, so that `frequencies_at` must be used."""
        return self.kind in ("dynamic", "longrope")

    @property
    def longest(self) -> int:
        """Longest context in tokens, with the scaling applied.

        A factor multiplies the original length if config.json states one. `max_position` may already be the scaled
        length; with llama3 scaling it always is.
        """
        if self.kind not in ("linear", "dynamic", "yarn"):
            return self.max_position
        s = dict(self.scaling)
        original = s.get("original_max_position_embeddings") or self.max_position
        return max(self.max_position, int(original * self._factor(s)))

    @property
    def exact_prompt(self) -> int:
        """Longest prompt, in tokens, for which the results equal those of transformers.

        With dynamic scaling, transformers computes all frequencies of a longer prompt from the prompt's whole length,
        so that prompts of different lengths could not share cache blocks. Here each token's frequencies depend on its
        own position. With longrope, transformers rotates a sequence beyond the original length anew, with other
        frequencies, which a cache of keys cannot follow.
        """
        if self.kind == "longrope":
            return min(self._original, self.max_position)
        return self.max_position if self.moves else self.longest

    @property
    def _original(self) -> int:
        """Original length of a longrope model."""
        return int(dict(self.scaling)["original_max_position_embeddings"])

    def _factor(self, s: dict[str, Any]) -> float:
        if self.kind in ("yarn", "longrope") and "factor" not in s:  # the factor is the ratio of the two lengths
            return float(self.max_position / s["original_max_position_embeddings"])
        factor = float(s["factor"])
        if not 0 < factor < inf:
            raise ValueError(f"a factor of {factor}")
        return factor

    def inverse_frequencies(self) -> NDArray[np.float32]:
        """Return the frequencies, (rotary_dim / 2,), in radians per position."""
        s = dict(self.scaling)
        inv = self.theta ** (-np.arange(self.rotary_dim // 2) * 2.0 / self.rotary_dim)
        if self.kind == "linear":
            inv = inv / self._factor(s)
        elif self.kind == "llama3":
            inv = _llama3(inv, s, self._factor(s))
        elif self.kind == "yarn":
            inv = self._yarn(inv, s)
        elif self.kind == "longrope":
            inv = self._divided(inv, s["short_factor"])
        elif self.kind == "factors":  # one divisor per frequency
            inv = self._divided(inv, s["factors"])
        return inv.astype(np.float32)

    def frequencies_at(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the frequencies at `positions`, (positions, rotary_dim / 2), of a scaling with `moves`.

        longrope: those of short contexts up to the original length, those of long ones beyond it. dynamic: those of a
        context that ends with the token. transformers computes the same for tokens
        generated after a prompt that fits the model's length. Unlike in transformers, the frequencies of a longer
        prompt do not depend on how it is split into steps.
        """
        s, dim = dict(self.scaling), self.rotary_dim
        if self.kind == "longrope":
            plain = self.theta ** (-np.arange(dim // 2) * 2.0 / dim)
            short, long = self._divided(plain, s["short_factor"]), self._divided(plain, s["long_factor"])
            return np.where(positions[:, None] < self._original, short, long).astype(np.float32)
        factor, length = self._factor(s), self.max_position
        seen = np.maximum(positions + 1, length)
        theta = self.theta * (factor * seen / length - (factor - 1)) ** (dim / (dim - 2))
        return np.asarray(theta[:, None] ** (-np.arange(dim // 2) * 2.0 / dim), np.float32)

    def magnitude(self) -> float:
        """Factor by which cosines and sines are multiplied."""
        s = dict(self.scaling)
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if "attention_factor" in s:
            return float(s["attention_factor"])
        factor = self._factor(s)
        if self.kind == "longrope":
            return sqrt(1 + log(factor) / log(self._original)) if factor > 1 else 1.0

        def stretch(weight: float) -> float:
            return 0.1 * weight * log(factor) + 1.0 if factor > 1 else 1.0

        if s.get("mscale") and s.get("mscale_all_dim"):
            return stretch(s["mscale"]) / stretch(s["mscale_all_dim"])
        return stretch(1.0)

    @staticmethod
    def _divided(inv: Frequencies, divisors: Sequence[float]) -> Frequencies:
        """Return the frequencies divided by one number each."""
        found = np.asarray(divisors, np.float64)
        if found.shape != inv.shape:
            raise ValueError(f"{found.size} factors for {inv.size} frequencies")
        return np.asarray(inv / found)

    def _yarn(self, inv: Frequencies, s: dict[str, Any]) -> Frequencies:
        length, dim = s.get("original_max_position_embeddings") or self.max_position, self.rotary_dim

        def turning(turns: float) -> float:  # the dimension that rotates `turns` times in the original length
            return dim * log(length / (turns * 2 * pi)) / (2 * log(self.theta))

        low, high = turning(s.get("beta_fast") or 32), turning(s.get("beta_slow") or 1)
        if s.get("truncate", True):
            low, high = floor(low), ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / (high - low or 0.001), 0, 1)  # 0: kept; 1: interpolated
        return np.asarray(inv / self._factor(s) * ramp + inv * (1 - ramp))


def _kind_of(scaling: dict[str, Any]) -> str:
    """Return the type of a scaling, under either key.

    ModelError if the two keys differ, or if there are numbers but no type.
    """
    named = {str(scaling[key]) for key in ("rope_type", "type") if scaling.get(key) is not None}
    if len(named) > 1:
        raise ModelError(f"config.json: rope_scaling {scaling!r} names two types. Leave one of them out.")
    if not named and scaling.get("factor") not in (None, 1):
        raise ModelError(
            f"config.json: rope_scaling {scaling!r} has a factor but no rope_type. Add one of {', '.join(KINDS[1:5])}."
        )
    kind = named.pop() if named else "default"
    return _SAME_KINDS.get(kind, kind)


def _llama3(inv: Frequencies, s: dict[str, Any], factor: float) -> Frequencies:
    turns = s["original_max_position_embeddings"] * inv / (2 * pi)
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)  # 0: slow, interpolated; 1: fast, kept
    return np.asarray(inv * (smooth + (1 - smooth) / factor))
