"""Find the method of a checkpoint's matrices, and the stored tensors of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tokenmill import plugins
from tokenmill.errors import ArgumentError, Unsupported
from tokenmill.program.ops import Weight
from tokenmill.quant._memo import once
from tokenmill.quant._refused import reason
from tokenmill.quant._settings import described
from tokenmill.weights.checkpoint import Checkpoint


class Matrix(NamedTuple):
    """Matrix that a method stores, as found from headers: no number of it has been read."""

    shape: tuple[int, ...]  # (outputs, inputs), or (matrices, outputs, inputs), whatever `Weight.transposed` is
    tensors: tuple[str, ...]  # names of the stored tensors that belong to it
    form: str = ""  # what of the configuration the shape follows from, for messages


Find = Callable[[str], Matrix | None]
"""Name of a weight (`….down_proj.weight`) -> how it is stored; None if under its own name, as plain numbers"""


def method_of(source: Checkpoint) -> str:
    """Return the method that a checkpoint is stored in, a name of a file of this package."""
    found = described(source)
    if found is not None:
        return found.method
    return "gguf" if source.format == "gguf" else "none"


def module_of(source: Checkpoint) -> Any:
    """Import the file of the method that a checkpoint is stored in. Raises Unsupported if there is none."""
    method = method_of(source)
    found = described(source)
    module = _file(method)
    if module is not None and (found is None or hasattr(module, "matrix")):
        return module
    place = f"It is the quant_method of {found.place}." if found is not None else ""
    cure = reason(method) or "Serve a checkpoint of the model that is stored in one of these ways, or not quantized."
    raise Unsupported("quantization", method, stored_methods(), f"{place} {cure}".strip())


def _file(method: str) -> Any:
    """Import the file of a method; None if there is none."""
    try:
        return plugins.find("quant", method)
    except Unsupported:
        return None


def stored_methods() -> list[str]:
    """Return the methods that config.json may name, sorted."""
    return [name.replace("_", "-") for name in plugins.names("quant") if hasattr(_file(name), "matrix")]


def while_loading() -> list[str]:
    """Return the methods that --quantize may name for a checkpoint that is not quantized, sorted."""
    return [name.replace("_", "-") for name in plugins.names("quant") if hasattr(_file(name), "WHILE_LOADING")]


def notes(source: Checkpoint) -> tuple[str, ...]:
    """Return what the checkpoint's method does in the programs that made it and is not done here, for users."""
    found = getattr(module_of(source), "notes", None)
    return () if found is None else tuple(found(source))


def finder(source: Checkpoint) -> Find:
    """Return the function that finds how the weights of a checkpoint are stored. Raises as `module_of`."""
    matrix = getattr(module_of(source), "matrix", None)
    if matrix is None:
        return lambda name: None
    return lambda name: once(source, ("matrix", name), lambda: matrix(source, name))


def stored_names(weights: Iterable[Weight], source: Checkpoint) -> list[str]:
    """Return the names of the tensors that hold these weights, each once."""
    find = finder(source)
    parts = dict.fromkeys((part.name, weight.columns > 0) for weight in weights for part in weight.parts)
    found = {name: find(name) if is_matrix else None for name, is_matrix in parts}
    return list(dict.fromkeys(stored for name, m in found.items() for stored in (m.tensors if m else (name,))))


def chosen(source: Checkpoint, quantize: str) -> Any:
    """Return the file of the method that reads a checkpoint, with `quantize` as the user gave it, or "".

    Raises Unsupported for a method without a file, and ArgumentError if `quantize` contradicts what is stored.
    """
    stored, method = module_of(source), method_of(source)
    if not quantize:
        return stored
    if method != "none":
        names = stored.names(source) if hasattr(stored, "names") else (method,)
        if quantize in names:
            return stored
        raise ArgumentError(
            f"`quantize` is {quantize}, but the checkpoint is stored as {method!r}. Leave the option out"
            + (f", or give {' or '.join(names)}." if method != "gguf" else ".")
        )
    wanted = _file(quantize)
    if wanted is None:
        raise Unsupported("quantization", quantize, while_loading(), reason(quantize))
    if not hasattr(wanted, "WHILE_LOADING"):
        raise ArgumentError(
            f"`quantize` is {quantize}, but the checkpoint is not quantized, and {quantize} weights are not made while "
            f"loading. Leave the option out, give one that is ({', '.join(while_loading())}), or serve a checkpoint of "
            f"the model that is stored as {quantize}."
        )
    return wanted
