"""Decisions before any weight is read: support for a program, its fused form, the kernels of its attention."""

from __future__ import annotations

from tokenmill.backends.cuda import expert_shapes, state_limits
from tokenmill.backends.cuda.detect import flashinfer_missing
from tokenmill.backends.cuda.shapes import MOST_SHARED
from tokenmill.program import encoded, ops, passes, special
from tokenmill.program.ops import Op
from tokenmill.program.recurrence import RgLru
from tokenmill.program.value import Program

BY_TORCH: tuple[type[Op], ...] = (
    special.Clip, special.ScaleByWeight, special.ScaleByExpert, special.Sparsify, special.WithMagnitude, special.Beside,
    special.MixStreams, special.CorrectStreams, special.AddToOthers, special.Moments, special.NormOfShare,
)  # fmt: skip
"""Operations of single architectures that torch computes, without waiting for the device."""
KINDS = (
    ops.Embed, ops.Linear, ops.Norm, ops.AddNorm, ops.Attention, ops.GatedAct, ops.Act, ops.Add, ops.Scale,
    ops.SoftCap, ops.TakeRows, ops.Rope, ops.LatentAttention, special.ScaleByPosition, special.XIelu, ops.Route,
    ops.Experts, special.Within, encoded.InputIds, encoded.EncoderAttention, encoded.StoreInput,
    encoded.DecoderAttention, encoded.CrossAttention, ops.AllReduce, ops.Gather, *BY_TORCH,
    *state_limits.KINDS,
)  # fmt: skip
DTYPES = ("bfloat16", "float16", "float32")
KV_DTYPES = ("fp8_e4m3fn", "fp8_e5m2")
"""Dtypes of a cache, besides the computation's."""
ATTENTIONS = {
    "triton": "triton", "flashinfer": "flashinfer", "flashdecoding": "triton", "flashdecoding-ipex": "triton",
    "paged": "triton",
}  # fmt: skip
"""User's name of an attention, TGI's included -> the nearest kernels here."""
LEAST_CAPABILITY, FP8_CAPABILITY = (8, 0), (8, 9)
_ACTS = (
    "silu", "quick_gelu", "linear", "relu", "sigmoid", "relu2", "gelu", "gelu_new", "gelu_pytorch_tanh",
)  # fmt: skip
_HEAD_SIZES = range(16, 257)
_SPANS = encoded.EncoderAttention | encoded.DecoderAttention | encoded.CrossAttention
_WIDEST_NORM = 1 << 16
_WIDEST_ROW, _WIDEST_TURNED = 512, 128
_INVARIANT_COLUMNS = 16
_FLASHINFER_HEADS = (64, 128, 256)
_FLASHINFER_DTYPES = ("bfloat16", "float16")


def fused(program: Program) -> Program:
    """Return the program with the fusions that this backend's kernels implement. Needs no weights."""
    fusions = passes.add_into_norm, passes.heads_into_attention, passes.act_into_conv
    return passes.fuse(passes.take_rows_early(program), *fusions)


def refusal(program: Program, dtype: str, deterministic: bool = False) -> str:
    """Return why this backend cannot run a program, of one rank; "" if it can."""
    if dtype and dtype not in DTYPES:
        return f"it has no {dtype}"
    whys = (_why_not(op) or (deterministic and _not_invariant(op)) or "" for op in fused(program).ops)
    return next((why for why in whys if why), "")


def attention_of(program: Program, wanted: str, dtype: str, deterministic: bool = False) -> tuple[str, str]:
    """Return the kernels of runs of tokens, "triton" or "flashinfer", and why not flashinfer if it is `wanted`.

    The rule: flashinfer only at the user's wish. Single tokens use Triton in either case: its kernel rotates, caches
    and attends in one launch, and was faster than FlashAttention 3 at every batch and length measured.
    """
    if ATTENTIONS.get(wanted) != "flashinfer":
        return "triton", ""
    if why := flashinfer_missing():
        return "triton", why
    if deterministic:
        return "triton", "flashinfer splits a sequence by what else is in the step, and `--deterministic` is given"
    if dtype not in _FLASHINFER_DTYPES:
        return "triton", f"flashinfer has no {dtype} (give `--dtype bfloat16`)"
    for op in program.ops:
        if isinstance(op, ops.LatentAttention):
            return "triton", "flashinfer is not used for compressed rows"
        if isinstance(op, encoded.InputIds):
            return "triton", "flashinfer is not used for an encoder and a decoder"
        if isinstance(op, ops.Attention) and (op.alibi or op.sinks is not None or op.chunk):
            return "triton", "flashinfer is not used with ALiBi, sinks or chunks"
    sizes = {op.head_dim for op in program.ops if isinstance(op, ops.Attention)} - set(_FLASHINFER_HEADS)
    if sizes:
        allowed = ", ".join(map(str, _FLASHINFER_HEADS))
        return "triton", f"flashinfer has heads of {allowed}, this model of {', '.join(map(str, sorted(sizes)))}"
    return "flashinfer", ""


def _why_not(op: Op) -> str:
    if not isinstance(op, KINDS):
        return f"it has no kernel for {type(op).__name__}"
    act = getattr(op, "act", None)
    if act and act not in _ACTS:
        return f"it has no kernel for the activation {act}"
    if isinstance(op, ops.Norm) and op.out.width > _WIDEST_NORM:
        return f"a norm of {op.out.width} columns is too wide for it"
    if isinstance(op, ops.Rope) and op.head_dim % 2:
        return f"it rotates no heads of {op.head_dim}"
    if isinstance(op, ops.Attention):
        return _attention_refusal(op)
    if isinstance(op, ops.LatentAttention):
        return _latent_refusal(op)
    if isinstance(op, _SPANS) and op.head_dim > _HEAD_SIZES[-1]:
        return f"its attention has no heads of {op.head_dim}"
    return expert_shapes.refusal(op) or state_limits.refusal(op)


def _attention_refusal(op: ops.Attention) -> str:
    if op.head_dim not in _HEAD_SIZES or op.head_dim % 2:
        return f"its attention has no heads of {op.head_dim}"
    if op.q.width // op.k.width > MOST_SHARED:
        return f"{op.q.width // op.k.width} query heads share a key-value head"
    if op.chunk and op.window:
        return "it has no attention within chunks and a window"
    if bool(op.q_norm) != bool(op.k_norm):
        return "it normalizes queries and keys or neither"
    return ""


def _latent_refusal(op: ops.LatentAttention) -> str:
    turned = op.key.width
    if op.latent.width > _WIDEST_ROW or turned > _WIDEST_TURNED or turned % 2:
        return f"its attention has no compressed rows of {op.latent.width} + {turned} columns"
    if max(op.head_dim - turned, op.value_dim) > _HEAD_SIZES[-1]:
        return f"its attention to compressed rows has no heads of {max(op.head_dim - turned, op.value_dim)}"
    if op.rope is not None and (op.rope.interleaved or op.rope.rotary_dim != turned):
        return "its attention to compressed rows rotates all columns of the key, in halves or by `interleaved`"
    return ""


def _not_invariant(op: Op) -> str:
    if isinstance(op, RgLru):
        return "sums of its recurrent units depend on how a prompt is divided into steps"
    if isinstance(op, ops.Linear) and op.x.width % _INVARIANT_COLUMNS:
        columns = _INVARIANT_COLUMNS
        return f"its products that do not depend on the batch are of whole {columns} columns, not {op.x.width}"
    return ""
