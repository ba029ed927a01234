"""Choose the weight files among a model's files, by one rule for local folders and repositories on the Hub.

The order is that of transformers: model.safetensors, the files in its index, pytorch_model.bin, the files in its index.
If there are none of these, other .safetensors files, GGUF files and single variants follow. A name after the model's
(`owner/name:Q4_K_M`) selects a GGUF file. The choice depends on file names only; no file is opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from tokenmill.errors import MissingFiles, ModelError

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_MODEL, ADAPTER_PICKLED = "adapter_model.safetensors", "adapter_model.bin"

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{3,5})-of-(?P<count>\d{3,5})(?P<suffix>(\.[^/]+)?)", re.S)
_VARIANT = re.compile(r"(pytorch_)?model(\.[\w-]+(-\d+-of-\d+)?|-\d+-of-\d+\.[\w-]+)\.(safetensors|bin)")
_ADAPTER = re.compile(r"adapter_model.*\.(safetensors|bin)|adapter_config\.json")
_NO_WEIGHTS = re.compile("training|args|arguments|optimizer|scheduler|rng_state")
_QUANTIZATION = re.compile(r"(?:^|[-._/])((?:UD-)?(?:I?Q\d\w*|TQ\d_\d|BF16|F16|F32|MXFP4\w*))(?=[-./]|$)", re.I)
_CUT = re.compile(r"\.gguf[-.](split-?[a-z]+|part\d+(of\d+)?)$", re.I)
_LISTED = 8


@dataclass(frozen=True, slots=True)
class Weights:
    """Files that hold a model's weights.

    `format`: "safetensors", "pickled", "gguf", or "adapter" if there is only an adapter to another model. `files`:
    names relative to the folder, for a GGUF model its parts in order; empty if `index` is set. `index`: name of the
    index file that lists the weights; "" if there is none.
    """

    format: str
    files: tuple[str, ...] = ()
    index: str = ""


@dataclass(frozen=True, slots=True)
class FileSet:
    """Parts of one split file, or a single file. `missing`: names of absent parts."""

    label: str  # name without part number and suffix
    files: tuple[str, ...]
    missing: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the file, or of the first part."""
        return self.files[0]


def choose(names: Iterable[str], where: str, wanted: str = "", explicit: str = "") -> Weights:
    """Choose the weights among `names`, paths relative to the model's folder or repository.

    `where`: the model as the user gives it, for messages. `wanted`: name of a GGUF file or a part of it, such as
    "Q4_K_M"; "" for none. `explicit`: the file that config.json names as "transformers_weights"; "" for none.
    Raises ModelError with the remedy if there are no weights, if parts are missing, or if the choice is ambiguous.
    """
    names = sorted(names)
    ggufs = _gguf_sets(names)
    if wanted:
        return _gguf(_named(ggufs, wanted, where), where)
    top = {name for name in names if "/" not in name}
    found = _explicit(explicit, top, where) if explicit else _transformers_choice(top)
    if found and (not ggufs or "config.json" in top):
        return found
    own = [name for name in top if name.endswith(".safetensors") and not _ADAPTER.fullmatch(name)]
    own = [name for name in own if not _NO_WEIGHTS.search(name)]
    plain = [name for name in own if not _VARIANT.fullmatch(name) and not name.startswith("consolidated")]
    if plain and (not ggufs or "config.json" in top):
        return Weights("safetensors", _together(plain, where))
    parts = [name for name in top if re.fullmatch(r"pytorch_model-\d+-of-\d+\.bin", name)]
    if parts and not ggufs:
        return Weights("pickled", _together(parts, where))
    if ggufs:
        return _gguf(_only([s for s in ggufs if "/" not in s.name] or ggufs, where), where)
    if any(_ADAPTER.fullmatch(name) for name in top):
        return _adapter(top, where)
    return _last_resort(top, own, where) or _refuse(names, where)


def _adapter(top: set[str], where: str) -> Weights:
    """Return the file of an adapter. Raises MissingFiles if there is none, or no configuration that names the base."""
    found = next((name for name in (ADAPTER_MODEL, ADAPTER_PICKLED) if name in top), None)
    lacking = ADAPTER_CONFIG if found else ADAPTER_MODEL
    if found is None or ADAPTER_CONFIG not in top:
        raise MissingFiles(f"{where} is an adapter that lacks {lacking}. Copy the file there.", (lacking,))
    return Weights("adapter", (found,))


def indexed_files(content: Mapping[str, Any], index: str) -> dict[str, str]:
    """Return an index's map of tensors to file names. ModelError if it has none, or names files in other folders."""
    listed = content.get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise ModelError(f'{index} has no "weight_map" of file names. Download the file again.')
    for name in set(listed.values()):
        if not name or PurePosixPath(name).name != name or "\\" in name or name in (".", ".."):
            raise ModelError(f"{index} names a file outside the model's folder: {name!r}.")
    return listed


def parts_of(name: str) -> list[str]:
    """Return the names of all parts of a split file, in order, given one of them; `name` alone if it is not a part."""
    match = _PART.fullmatch(name)
    if not match or not 1 <= int(match["number"]) <= int(match["count"]):
        return [name]
    return [_part(match, number) for number in range(1, int(match["count"]) + 1)]


def file_sets(names: Iterable[str]) -> list[FileSet]:
    """Group names by the split file that they are parts of."""
    parts: dict[tuple[str, str, str], list[re.Match[str]]] = {}
    found: list[FileSet] = []
    for name in sorted(names):
        match = _PART.fullmatch(name)
        if match and 1 <= int(match["number"]) <= int(match["count"]):
            parts.setdefault((match["stem"], match["count"], match["suffix"]), []).append(match)
        else:
            found.append(FileSet(name.rpartition(".")[0] or name, (name,)))
    for (stem, count, _), matches in parts.items():
        there = {int(match["number"]) for match in matches}
        lacking = [_part(matches[0], number) for number in range(1, int(count) + 1) if number not in there]
        found.append(FileSet(stem, tuple(match[0] for match in matches), tuple(lacking)))
    return sorted(found, key=lambda each: each.name)


def _part(match: re.Match[str], number: int) -> str:
    return f"{match['stem']}-{number:0{len(match['number'])}}-of-{match['count']}{match['suffix']}"


def _transformers_choice(top: set[str]) -> Weights | None:
    if SAFETENSORS in top:
        return Weights("safetensors", (SAFETENSORS,))
    if SAFETENSORS_INDEX in top:
        return Weights("safetensors", index=SAFETENSORS_INDEX)
    if PICKLED in top:
        return Weights("pickled", (PICKLED,))
    return Weights("pickled", index=PICKLED_INDEX) if PICKLED_INDEX in top else None


def _explicit(name: str, top: set[str], where: str) -> Weights:
    if name not in top or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise ModelError(
            f'{where}: config.json names {name!r} as its "transformers_weights", which is no .safetensors file or '
            "index there. Download the model again, or take the key out."
        )
    return Weights("safetensors", index=name) if name.endswith(".json") else Weights("safetensors", (name,))


def _together(names: Sequence[str], where: str) -> tuple[str, ...]:
    """Choose among files without an index: the only complete set of parts, or all single files."""
    sets = file_sets(names)
    whole = [each for each in sets if not each.missing]
    if not whole:
        raise _incomplete(sets[0], where)
    split = [each for each in whole if len(each.files) > 1]
    if len(split) > 1:
        listed = ", ".join(each.name for each in split)
        raise ModelError(f"{where} has weights in several sets of files ({listed}). Keep one of them, with its index.")
    return (split or [FileSet("", tuple(each.name for each in whole))])[0].files


def _last_resort(top: set[str], own: Sequence[str], where: str) -> Weights | None:
    """Choose a single variant or Mistral's own file, if there are no other weights."""
    indexes = [
        name for name in top if re.fullmatch(r"(model\.safetensors|pytorch_model\.bin)\.index\.[\w-]+\.json", name)
    ]
    if len(indexes) == 1:
        return Weights("safetensors" if indexes[0].startswith("model") else "pickled", index=indexes[0])
    pickled = [name for name in top if _VARIANT.fullmatch(name) and name.endswith(".bin")]
    for kind, names in (("safetensors", own), ("pickled", pickled)):
        variants = file_sets(name for name in names if not name.startswith("consolidated"))
        variants = variants or file_sets(names)
        if len(variants) > 1:
            listed = ", ".join(each.name for each in variants)
            raise ModelError(f"{where} has several variants of the weights ({listed}) and no plain ones. Keep one.")
        if variants and variants[0].missing:
            raise _incomplete(variants[0], where)
        if variants:
            return Weights(kind, variants[0].files)
    return None


def _gguf_sets(names: Iterable[str]) -> list[FileSet]:
    """Group the GGUF models among the files, leaving out image projectors and calibration data."""
    models = []
    for name in names:
        base = name.rpartition("/")[2].lower()
        calibration = "imatrix" in base and not _QUANTIZATION.search(base)
        if base.endswith(".gguf") and "mmproj" not in base and not calibration:
            models.append(name)
    return file_sets(models)


def _named(ggufs: Sequence[FileSet], wanted: str, where: str) -> FileSet:
    lowered = wanted.lower()
    exact = [s for s in ggufs if any(lowered in (f.lower(), f.rpartition("/")[2].lower()) for f in s.files)]
    exact = exact or [s for s in ggufs if lowered in (s.label.lower(), s.label.rpartition("/")[2].lower())]
    bounded = re.compile(rf"(^|[-._/]){re.escape(lowered)}([-./]|$)")
    matching = exact or [s for s in ggufs if bounded.search(s.label.lower())]
    if len(matching) == 1:
        return matching[0]
    if not ggufs:
        raise MissingFiles(f"{where} has no GGUF files, so {wanted!r} selects nothing. Leave it out.", (wanted,))
    many = f"{len(matching)} GGUF models match" if matching else "no GGUF model matches"
    message = f"{where}: {many} {wanted!r}. Give the name of one, whole, after the colon: {_list(matching or ggufs)}."
    raise ModelError(message) if matching else MissingFiles(message, (wanted,))


def _only(ggufs: Sequence[FileSet], where: str) -> FileSet:
    if len(ggufs) == 1:
        return ggufs[0]
    label = _QUANTIZATION.search(ggufs[0].label)
    raise ModelError(
        f"{where} has {len(ggufs)} GGUF models. Choose one by its name or quantization after a colon, as "
        f"`{where}:{label[1] if label else ggufs[0].name}`: {_list(ggufs)}."
    )


def _list(sets: Sequence[FileSet]) -> str:
    more = f" and {len(sets) - _LISTED} more" if len(sets) > _LISTED else ""
    return ", ".join(each.name for each in sets[:_LISTED]) + more


def _gguf(chosen: FileSet, where: str) -> Weights:
    if chosen.missing:
        raise _incomplete(chosen, where)
    return Weights("gguf", chosen.files)


def _incomplete(parts: FileSet, where: str) -> MissingFiles:
    lacking = ", ".join(parts.missing[:_LISTED]) + (" …" if len(parts.missing) > _LISTED else "")
    whole = len(parts.files) + len(parts.missing)
    message = f"{where} has {len(parts.files)} of {whole} parts; missing: {lacking}. Download the model again."
    return MissingFiles(message, parts.missing)


def _refuse(names: Sequence[str], where: str) -> Weights:
    suffixes = {PurePosixPath(name).suffix for name in names}
    nested = [name for name in names if "/" in name and name.endswith((SAFETENSORS, SAFETENSORS_INDEX))]
    cut = [name for name in names if _CUT.search(name)]
    if cut:
        why = f"{cut[0]} is a piece of a file that was cut up: join the pieces in order with `cat` to one .gguf file."
    elif nested:
        why = f"Its sub-folder {nested[0].rpartition('/')[0]} has some: give that folder."
    elif suffixes & {".bin", ".pt", ".pth", ".ckpt"}:
        why = (
            "Its weights are pickled (.bin, .pt, .pth), which may run code when read, under names that transformers "
            "does not load: convert them to .safetensors."
        )
    elif suffixes & {".h5", ".msgpack", ".onnx", ".nemo", ".mlx", ".npz", ".tflite"}:
        why = "Its weights are in another library's format: convert them to .safetensors with transformers."
    else:
        why = "Expected .safetensors files with config.json, a .gguf file, or pytorch_model.bin."
    raise MissingFiles(f"{where} has no weights to serve. {why}", ("the weights",))
