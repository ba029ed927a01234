"""Rotary position embeddings: the frequencies of each scaling, from config.json's numbers alone.

Tables are not materialized: a step's cosines come from its positions and half a head's frequencies, so a context of a
million tokens costs nothing. (Scalings: linear, kaiokendev 2023; dynamic NTK, emozilla 2023; YaRN, arXiv:2309.00071;
llama3, Meta's Llama 3.1 reference.)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, inf, log, pi
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmill.errors import ModelError, Unsupported

Scaling = tuple[tuple[str, Any], ...]
Frequencies = NDArray[np.float64]
KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "factors")
_CURES = dict.fromkeys(
    ("longrope", "su"),
    "Its frequencies change when a sequence outgrows the original length, which a cache of keys cannot follow: "
    "serve a model whose rope_scaling is of one of these types.",
)


@dataclass(frozen=True, slots=True)
class RopeTable:
    """cos and sin by position. `scaling`: config.json's object as sorted pairs, lists as tuples, for it is a key."""

    rotary_dim: int
    theta: float
    max_position: int
    scaling: Scaling = ()

    @staticmethod
    def of(rotary_dim: int, theta: float, max_position: int, scaling: dict[str, Any] | None) -> RopeTable:
        """Checked. Unsupported for a scaling that is not known, ModelError for one that lacks a number."""
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in (scaling or {}).items()}
        kind = _kind_of(given)
        if kind not in KINDS:
            raise Unsupported("rope scaling", str(kind), KINDS, _CURES.get(kind, ""))
        kept = {k: v for k, v in given.items() if k not in ("rope_type", "type") and (v is not None or k == "truncate")}
        table = RopeTable(rotary_dim, theta, max_position, (("rope_type", kind), *sorted(kept.items())))
        try:
            table.inverse_frequencies(), table.magnitude(), table.longest
            if table.moves:
                table.frequencies_at(np.zeros(1, np.int64))
        except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as e:
            raise ModelError(f"config.json: rope_scaling {scaling!r} is incomplete or wrong: {e!r}.") from e
        return table

    @property
    def kind(self) -> str:
        """The scaling's name."""
        return str(dict(self.scaling).get("rope_type", "default"))

    @property
    def moves(self) -> bool:
        """True if the frequencies depend on the position (dynamic): then use `frequencies_at`."""
        return self.kind == "dynamic"

    @property
    def longest(self) -> int:
        """Tokens of the longest context that the scaling makes of `max_position`.

        A factor stretches the original length, where there is one; `max_position` may be the product already. That of
        llama3 always is.
        """
        if self.kind not in ("linear", "dynamic", "yarn"):
            return self.max_position
        s = dict(self.scaling)
        original = s.get("original_max_position_embeddings") or self.max_position
        return max(self.max_position, int(original * self._factor(s)))

    @property
    def exact_prompt(self) -> int:
        """Tokens of the longest prompt whose numbers are transformers'.

        Of a longer one dynamic scaling takes the whole length for every token's frequencies there, so that no two
        prompts could share a block of the cache; here it is each token's own position.
        """
        return self.max_position if self.moves else self.longest

    def _factor(self, s: dict[str, Any]) -> float:
        if self.kind == "yarn" and "factor" not in s:  # said by the two lengths
            return float(self.max_position / s["original_max_position_embeddings"])
        factor = float(s["factor"])
        if not 0 < factor < inf:
            raise ValueError(f"a factor of {factor}")
        return factor

    def inverse_frequencies(self) -> NDArray[np.float32]:
        """(rotary_dim / 2,) radians a position."""
        s = dict(self.scaling)
        inv = self.theta ** (-np.arange(self.rotary_dim // 2) * 2.0 / self.rotary_dim)
        if self.kind == "linear":
            inv = inv / self._factor(s)
        elif self.kind == "llama3":
            inv = _llama3(inv, s, self._factor(s))
        elif self.kind == "yarn":
            inv = self._yarn(inv, s)
        elif self.kind == "factors":  # one divisor a frequency
            factors = np.asarray(s["factors"], np.float64)
            if factors.shape != inv.shape:
                raise ValueError(f"{factors.size} factors for {inv.size} frequencies")
            inv = inv / factors
        return inv.astype(np.float32)

    def frequencies_at(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """(positions, rotary_dim / 2) of a scaling that `moves`: each token's are those of a context that ends with it.

        This is what transformers does to tokens generated behind a prompt of at most the model's length. Unlike there,
        a longer prompt's frequencies do not depend on how it is cut into steps.
        """
        s, dim = dict(self.scaling), self.rotary_dim
        factor, length = self._factor(s), self.max_position
        seen = np.maximum(positions + 1, length)
        theta = self.theta * (factor * seen / length - (factor - 1)) ** (dim / (dim - 2))
        return np.asarray(theta[:, None] ** (-np.arange(dim // 2) * 2.0 / dim), np.float32)

    def magnitude(self) -> float:
        """What cosines and sines are multiplied by."""
        s = dict(self.scaling)
        if self.kind != "yarn":
            return 1.0
        if "attention_factor" in s:
            return float(s["attention_factor"])
        factor = self._factor(s)

        def stretch(weight: float) -> float:
            return 0.1 * weight * log(factor) + 1.0 if factor > 1 else 1.0

        if s.get("mscale") and s.get("mscale_all_dim"):
            return stretch(s["mscale"]) / stretch(s["mscale_all_dim"])
        return stretch(1.0)

    def _yarn(self, inv: Frequencies, s: dict[str, Any]) -> Frequencies:
        length, dim = s.get("original_max_position_embeddings") or self.max_position, self.rotary_dim

        def turning(turns: float) -> float:  # the dimension that turns so often over the original length
            return dim * log(length / (turns * 2 * pi)) / (2 * log(self.theta))

        low, high = turning(s.get("beta_fast") or 32), turning(s.get("beta_slow") or 1)
        if s.get("truncate", True):
            low, high = floor(low), ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / (high - low or 0.001), 0, 1)  # 0: fast, kept; 1: slow, stretched
        return np.asarray(inv / self._factor(s) * ramp + inv * (1 - ramp))


def _kind_of(scaling: dict[str, Any]) -> str:
    """The type, in either spelling. ModelError if there are two, or none beside numbers that only a type explains."""
    named = {str(scaling[key]) for key in ("rope_type", "type") if scaling.get(key) is not None}
    if len(named) > 1:
        raise ModelError(f"config.json: rope_scaling {scaling!r} names two types. Leave one of them out.")
    if not named and scaling.get("factor") not in (None, 1):
        raise ModelError(
            f"config.json: rope_scaling {scaling!r} has a factor but no rope_type. Add one of {', '.join(KINDS[1:5])}."
        )
    return named.pop() if named else "default"


def _llama3(inv: Frequencies, s: dict[str, Any], factor: float) -> Frequencies:
    turns = s["original_max_position_embeddings"] * inv / (2 * pi)
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)  # 0: slow waves, stretched; 1: fast waves, kept
    return np.asarray(inv * (smooth + (1 - smooth) / factor))
