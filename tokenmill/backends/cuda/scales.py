"""Scales of an FP8 KV cache, from a checkpoint calibrated for one. A stored number is multiplied by its scale.

The names are those of the usual calibration tools: a number for a layer's keys and one for its values, or one for both.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable
from math import prod

from tokenmill.program.ops import Part, Weight
from tokenmill.quant.base import load
from tokenmill.quant.none import read
from tokenmill.weights.checkpoint import Checkpoint

SCALED = "fp8_e4m3fn"
"""The only format with scales. The other one, with five bits of exponent, has the range of float16."""

_NAME = re.compile(
    r"(?:.*\.)?(?:layers|h|blocks)\.(?P<layer>\d+)\.(?:self_attn|self_attention|attn|attention)\."
    r"(?:(?:attn\.|qkv_proj\.)?(?P<of>kv|k|v)_scale"  # compressed-tensors, vLLM, AutoFP8
    r"|(?P<projection>k|v)_proj\.(?:(?P=projection)_scale|output_scale))"  # ModelOpt, Quark
)
_log = logging.getLogger(__name__)


def kv_scales(
    checkpoint: Checkpoint, layers: Iterable[int], kv_cache_dtype: str = SCALED
) -> dict[int, tuple[float, float]]:
    """Return for each of `layers` the scales of its keys and of its values; 1 where the checkpoint has none.

    Reads only the tensors of these names. If there is a number for each head, the largest is taken, which fits all
    heads. A scale that is not a positive number counts as none, which is logged.
    """
    wanted = set(layers)
    found: dict[tuple[int, str], float] = {}
    for name in checkpoint.names() if kv_cache_dtype == SCALED else ():
        match = _NAME.fullmatch(name)
        if match is not None and int(match["layer"]) in wanted:
            found[int(match["layer"]), match["of"] or match["projection"]] = _scale(checkpoint, name)

    def of(layer: int, kind: str) -> float:
        return found.get((layer, kind), found.get((layer, "kv"), 1.0))

    return {layer: (of(layer, "k"), of(layer, "v")) for layer in sorted(wanted)}


def advice(checkpoint: Checkpoint, layers: Iterable[int]) -> str:
    """Return the advice to use an FP8 cache, for a checkpoint with scales whose user chose no format; "" without."""
    scales = kv_scales(checkpoint, layers)
    found = sum(pair != (1.0, 1.0) for pair in scales.values())
    if not found:
        return ""
    return (
        f"the checkpoint is calibrated for an FP8 cache, with scales for {found} of {len(scales)} layers: with "
        f"--kv-cache-dtype {SCALED} it holds twice the tokens, and decode attention takes about 0.6 of the time "
        "(compute capability 8.9 or later)"
    )


def _scale(checkpoint: Checkpoint, name: str) -> float:
    stored = Weight((Part(name, prod(checkpoint.shape(name) or ())),))
    largest = float(load(stored, checkpoint, read).floats().max(initial=0.0))
    if math.isfinite(largest) and largest > 0:
        return largest
    _log.warning("The checkpoint's %s is %s, which is no scale: 1 is used.", name, largest)
    return 1.0
