"""Shapes of the tensors of a checkpoint that a program names."""

from __future__ import annotations

from tokenmill.program.cost import weights_of
from tokenmill.program.value import Program


def shapes_of(program: Program) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's tensors, by transformers' names."""
    rows, stacked, found = dict[str, int](), dict[str, int](), dict[str, tuple[int, ...]]()
    parts = [(part, weight) for weight in weights_of(program) for part in weight.parts]
    for part, _ in parts:
        rows[part.name] = max(rows.get(part.name, 0), part.end)
        if part.index is not None:
            stacked[part.name] = max(stacked.get(part.name, 0), part.index + 1)
    for part, weight in parts:
        matrix = (rows[part.name], weight.columns) if weight.columns else (rows[part.name],)
        matrix = matrix[::-1] if weight.transposed else matrix
        if part.below:
            found[part.name] = part.below * matrix[0], *matrix[1:]
        else:
            found[part.name] = (*([stacked[part.name]] if part.name in stacked else []), *matrix)
    return found
