"""compressed-tensors' description of a quantization: groups of modules, and how the weights of each are stored."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from tokenmill.errors import ModelError
from tokenmill.quant._beside import Block
from tokenmill.quant._memo import once
from tokenmill.quant._modules import listed, names_of
from tokenmill.quant._settings import misfits, settings
from tokenmill.weights.checkpoint import Checkpoint

FORMATS = (
    "dense", "fakequant", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized",
    "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision",
)  # fmt: skip
_CURE = "Serve a checkpoint of the model in one of these formats, or without sparsity."
_CLASS = "Linear"
_BLOCKED = ("group", "tensor_group")


class Arguments(msgspec.Struct, frozen=True):
    """Quantization of weights or of activations."""

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str | None = None
    group_size: int | None = None
    block_structure: list[int] | str | None = None
    dynamic: bool | str = False

    @property
    def is_fp8(self) -> bool:
        """True for FP8."""
        return self.type == "float" and self.num_bits == 8

    @property
    def block(self) -> Block | None:
        """Block of weights that share a scale; None: one of rows or of the tensor."""
        if self.strategy == "block" and self.block_structure:
            sizes = self.block_structure
            height, width = sizes.lower().split("x") if isinstance(sizes, str) else sizes
            return int(height), int(width)
        grouped = self.strategy in _BLOCKED or self.strategy is None
        return (1, self.group_size) if grouped and self.group_size and self.group_size > 0 else None


class Group(msgspec.Struct, frozen=True):
    """Modules whose weights are stored alike."""

    targets: list[str]
    weights: Arguments | None = None
    input_activations: Arguments | None = None
    format: str | None = None


class Sparsity(msgspec.Struct, frozen=True):
    """Compression of zeros."""

    format: str = "dense"


class Settings(msgspec.Struct, frozen=True):
    """Fields of the checkpoint's description that are read."""

    config_groups: dict[str, Group | list[str]] = {}
    format: str = "dense"
    sparsity_config: Sparsity | None = None
    transform_config: dict[str, Any] | None = None


def groups_of(source: Checkpoint) -> dict[str, Group]:
    """Return the groups whose weights are quantized, by name. Raises ModelError for a format that is not supported."""
    return once(source, "groups", lambda: _groups_of(source))


def _groups_of(source: Checkpoint) -> dict[str, Group]:
    given = settings(source, Settings)
    stored = [given.format, *(g.format for g in given.config_groups.values() if isinstance(g, Group) and g.format)]
    for name in stored:
        if name not in FORMATS:
            raise misfits(source, "format", name, FORMATS, _CURE)
    if given.sparsity_config is not None and given.sparsity_config.format != "dense":
        raise misfits(source, "sparsity_config.format", given.sparsity_config.format, ("dense",), _CURE)
    _refuse_transforms(source, given.transform_config or {})
    found = {name: _preset(source, name, group) for name, group in given.config_groups.items()}
    for name, group in found.items():
        _check(source, name, group)
    return {name: group for name, group in found.items() if group.weights is not None}


def _preset(source: Checkpoint, name: str, group: Group | list[str]) -> Group:
    """Return a group that only names a preset, such as W4A16 or FP8_DYNAMIC, and its targets."""
    if isinstance(group, Group):
        return group
    match = re.fullmatch(r"W(\d)A(\d+)(_ASYM)?", name.upper())
    if name.upper() in ("FP8", "FP8_DYNAMIC"):
        return Group(group, Arguments(type="float"), Arguments(type="float"))
    if name.upper() == "FP8_BLOCK":
        weights = Arguments(type="float", strategy="block", block_structure=[128, 128])
        return Group(group, weights, Arguments(type="float"))
    if name.upper() in ("INT8", "W8A8"):
        return Group(group, Arguments(), Arguments())
    if match:
        return Group(group, Arguments(num_bits=int(match[1]), symmetric=not match[3], strategy="group", group_size=128))
    if "FP4" in name.upper():
        return Group(group, Arguments(num_bits=4, type="float"))
    allowed = ("W4A16", "W8A16", "W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "MXFP4", "an object")
    raise misfits(source, f"config_groups.{name}", group, allowed, _CURE)


def _check(source: Checkpoint, name: str, group: Group) -> None:
    weights = group.weights
    if weights is None:
        return
    key = f"config_groups.{name}.weights"
    if weights.type not in ("int", "float"):
        raise misfits(source, f"{key}.type", weights.type, ("int", "float"), _CURE)
    allowed = range(2, 9) if weights.type == "int" else (4, 8)
    if weights.num_bits not in allowed:
        raise misfits(source, f"{key}.num_bits of {weights.type}", weights.num_bits, allowed, _CURE)
    strategies = ("tensor", "channel", "group", "block", "tensor_group")
    if weights.strategy is not None and weights.strategy not in strategies:
        raise misfits(source, f"{key}.strategy", weights.strategy, strategies, _CURE)
    try:
        block = weights.block
    except (ValueError, TypeError):
        raise misfits(source, f"{key}.block_structure", weights.block_structure, ("[rows, columns]",), _CURE) from None
    if block is not None and min(block) < 1:
        raise misfits(source, f"{key}.block_structure", weights.block_structure, ("[rows, columns]",), _CURE)


def _refuse_transforms(source: Checkpoint, config: dict[str, Any]) -> None:
    """Raise ModelError for rotations of activations. Those of weights are in the stored weights already."""
    for name, scheme in (config.get("config_groups") or {}).items():
        applied = scheme.get("apply") or [] if isinstance(scheme, dict) else []
        for one in applied:
            location = one.get("location") if isinstance(one, dict) else one
            if not str(location).startswith("weight_"):
                key = f"transform_config.config_groups.{name}.apply.location"
                raise misfits(source, key, location, ("weight_input", "weight_output"), _CURE)


def group_of(source: Checkpoint, name: str) -> Group:
    """Return the group of the weight `name`, which is stored quantized. Raises ModelError if it is in none."""
    groups = groups_of(source)
    module = name.removesuffix(".weight")
    by_name = [g for g in groups.values() if any(_names(target, module) for target in g.targets)]
    by_class = [g for g in groups.values() if _CLASS in g.targets]
    if by_name or by_class:
        return (by_name or by_class)[0]
    if len(groups) == 1:
        return next(iter(groups.values()))
    targets = sorted({target for group in groups.values() for target in group.targets})
    raise ModelError(
        f"{name!r} is stored quantized, but no group of config_groups in config.json has it among its targets: "
        f"{', '.join(targets) or 'there is no group'}. Copy config.json from the model's repository again."
    )


def _names(target: str, module: str) -> bool:
    """Return True if a target is a module's name or a regular expression of it. compressed-tensors has no parts."""
    return listed(module, (target,)) if target.startswith("re:") else target in names_of(module)
