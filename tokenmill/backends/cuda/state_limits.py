"""Which operations with a state have kernels. Needs neither a device nor Triton."""

from __future__ import annotations

from tokenmill.program.ops import Op
from tokenmill.program.recurrence import CausalConv, DeltaRule, RgLru, StateSpace

KINDS: tuple[type[Op], ...] = (CausalConv, StateSpace, DeltaRule, RgLru)
_WIDEST = 256  # columns of a head, or of a state
_MOST_TAPS = 16


def refusal(op: Op) -> str:
    """Return why an operation with a state has no kernel; "" if it has one."""
    if isinstance(op, CausalConv):
        taps = op.weight.columns
        return f"it has no convolution over {taps} tokens" if taps > _MOST_TAPS else ""
    if isinstance(op, StateSpace):
        _, width, columns = op.state().shape
        if op.a_log.columns and (width > 1 or op.groups > 1):
            return "its scan has a decay for each column of a state for heads of one column only"
        return _too_wide(width, columns)
    if isinstance(op, DeltaRule):
        return _too_wide(*op.state().shape[1:])
    if isinstance(op, RgLru):
        return _too_wide(op.x.width // len(op.input_gate))
    return ""


def _too_wide(*sizes: int) -> str:
    return f"its layers with a state have no heads of {max(sizes)} columns" if max(sizes) > _WIDEST else ""
