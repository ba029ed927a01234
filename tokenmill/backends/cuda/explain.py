"""The kernels that serve each kind of operation of a program, and the rules behind them, for `tokenmill doctor`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tokenmill.backends.accounts import Use
from tokenmill.backends.cuda.detect import flashinfer_missing, flashinfer_version
from tokenmill.backends.cuda.explain_ranks import rank_rules
from tokenmill.backends.cuda.held import Held
from tokenmill.backends.cuda.prepare import attention_of, fused
from tokenmill.backends.cuda.products.coded_shapes import crossover
from tokenmill.backends.cuda.products.dense import MANY, MOST, few_shape, row_shape
from tokenmill.backends.cuda.products.forms import Unpackable, form_of
from tokenmill.backends.cuda.products.fp8 import is_fp8
from tokenmill.backends.cuda.products.fp8_shapes import WEIGHT_ONLY, WEIGHT_ONLY_BLOCKED
from tokenmill.backends.cuda.scales import SCALED, advice, kv_scales
from tokenmill.backends.cuda.shapes import CLASSES, Contexts, decode_shape, span_shape
from tokenmill.program import encoded, ops, recurrence, special
from tokenmill.program.cost import cache_layout
from tokenmill.program.ops import Op, Weight
from tokenmill.program.value import Program
from tokenmill.quant.coded import Coded
from tokenmill.weights.checkpoint import Checkpoint

_NAMES: dict[type[Op], str] = {
    ops.Embed: "embed_rows", ops.GatedAct: "gate_rows", ops.TakeRows: "take_rows", ops.Rope: "rotate_heads",
    special.ScaleByPosition: "scale_rows", special.XIelu: "xielu_rows", ops.Route: "route",
    ops.AllReduce: "reduce_rows, reduce_tiles or NCCL", ops.Gather: "gather_rows",
    recurrence.CausalConv: "convolve", recurrence.RgLru: "single tokens lru_single, runs lru_gates and lru_runs",
    encoded.InputIds: "in embed_rows", encoded.StoreInput: "write_rows",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelOptions:
    """Options that decide which kernels run: `dtype` of the computation, the others as the user gave them.

    `held`: the matrices of the fused program that stay quantized.
    """

    dtype: str
    kv_cache_dtype: str = ""
    deterministic: bool = False
    attention: str = ""
    held: Mapping[Weight, Held] = field(default_factory=dict)
    copies: bool = True  # The GPU has a copy engine for tiles: Hopper and later.
    ranks: int = 1

    @property
    def item_bytes(self) -> int:
        """Bytes of a number of the computation."""
        return 4 if self.dtype == "float32" else 2


def kernels_of(program: Program, options: KernelOptions) -> dict[str, Counter[str]]:
    """Return the kernels by kind of operation, with the number of operations of each. Needs no weights, no device.

    `program`: as recorded, or of one rank; one that the backend does not refuse.
    """
    found: dict[str, Counter[str]] = {}
    prepared = fused(program).ops
    runs, _ = attention_of(program, options.attention, options.dtype, options.deterministic)
    for before, op, behind in zip((None, *prepared), prepared, (*prepared[1:], None), strict=False):
        if isinstance(op, ops.Linear):
            kernel = _linear(op, _is_gated(op, behind), options)
        elif isinstance(op, ops.Attention):
            kernel = _attention(op, runs, options)
        elif isinstance(op, ops.LatentAttention):
            kernel = _latent(op, options)
        elif isinstance(op, ops.GatedAct) and isinstance(before, ops.Linear) and _is_gated(before, op):
            kernel = _behind(_linear(before, True, options))
        else:
            kernel = _other(op, options)
        found.setdefault(type(op).__name__, Counter())[kernel] += 1
    return found


def form_of_matrix(parts: Sequence[Coded], use: Use, dtype: str, *, fp8: bool) -> str:
    """Return the form in which a matrix of these parts lies on the device, or why it is converted.

    `fp8`: the device has tensor cores for it.
    """
    if all(part.dense for part in parts):
        return dtype
    if use == "table" or dtype == "float32":
        why = "rows of it are looked up" if use == "table" else "products in float32 are"
        return f"converted to {dtype} at load: {why}"
    if use == "product" and fp8 and all(is_fp8(part) for part in parts):
        rows = WEIGHT_ONLY_BLOCKED if parts[0].block[1] else WEIGHT_ONLY
        return f"FP8; up to {rows} rows activations stay in {dtype}"
    try:
        return f"packed as {form_of(parts)}"
    except Unpackable as reason:
        return f"converted to {dtype} at load: {reason}"


def rules_of(program: Program, checkpoint: Checkpoint, options: KernelOptions) -> dict[str, str]:
    """Return the rules of the whole program by name: whose attention and why, the cache's format, determinism.

    Read the scales of an FP8 cache from the checkpoint.
    """
    return {
        "attention": _attention_rule(program, options),
        "KV cache": _cache(program, checkpoint, options),
        "deterministic": "yes: the same tokens whatever shares a step" if options.deterministic
        else "no: sums may differ in the last bit with the size of a step (--deterministic)",
        **(rank_rules(fused(program), options.item_bytes, options.ranks) if options.ranks > 1 else {}),
    }  # fmt: skip


def _attention_rule(program: Program, options: KernelOptions) -> str:
    runs, why_not = attention_of(program, options.attention, options.dtype, options.deterministic)
    if runs == "flashinfer":
        return f"flashinfer {flashinfer_version()}; single tokens triton"
    if why_not:
        return f"triton, not flashinfer: {why_not}"
    other = f", the nearest to {options.attention}" if options.attention not in ("", "triton") else ""
    there = "" if flashinfer_missing() else "; --attention flashinfer for runs of tokens"
    return f"triton{other}{there}"


def _cache(program: Program, checkpoint: Checkpoint, options: KernelOptions) -> str:
    layers = list(cache_layout(program))
    if not options.kv_cache_dtype:
        return "; ".join(filter(None, (options.dtype, advice(checkpoint, layers))))
    if options.kv_cache_dtype != SCALED:
        return options.kv_cache_dtype
    scaled = sum(pair != (1.0, 1.0) for pair in kv_scales(checkpoint, layers).values())
    return f"{SCALED}, scales of the checkpoint for {scaled} of {len(layers)} layers"


def _is_gated(op: ops.Linear, behind: Op | None) -> bool:
    """Return True if the next operation is an activation of both halves of a product: the product's kernel does it."""
    return isinstance(behind, ops.GatedAct) and behind.gate.buffer == behind.up.buffer == op.out.buffer


def _linear(op: ops.Linear, gated: bool, options: KernelOptions) -> str:
    if (one := options.held.get(op.weight)) is not None:
        return _quantized(one, op.out.width, options)
    return product_of(op.out.width // (2 if gated else 1), op.x.width, gated, options)


def _quantized(one: Held, outputs: int, options: KernelOptions) -> str:
    """Return the kernels of a product with a matrix that stays quantized."""
    if one.form is None:
        if options.deterministic:
            return "FP8: codes_by_codes at any number of rows"
        up_to = f"{WEIGHT_ONLY} rows ({WEIGHT_ONLY_BLOCKED} with scales of blocks)"
        return f"FP8: one_weight_only, few_weight_only up to {up_to}, codes_by_codes and the library's above"
    most = crossover(one.form, outputs)
    if options.deterministic or most >= 1 << 30:
        return f"few_coded at any number of rows ({one})"
    return f"few_coded up to {most} rows, unpack and cuBLAS above ({one})"


def product_of(outputs: int, columns: int, gated: bool, options: KernelOptions) -> str:
    """Return the kernels of a product by rows. `gated`: of two matrices, with an activation behind."""
    if options.deterministic:
        return "few_rows at any number of rows"
    if options.item_bytes > 2:
        return "cuBLAS"
    parts = []
    if row_shape(outputs, columns, gated) is not None:
        parts.append("one_row at 1 row")
    last = MANY if options.copies else MOST
    ours = [few_shape(rows, outputs, columns, gated) is not None for rows in range(2, last + 1)]
    if all(ours) and options.copies:
        return ", ".join([*parts, "few_rows above"])
    up_to = ours.index(False) + 1 if False in ours else last
    if up_to > 1:
        parts.append(f"few_rows up to {up_to}" + (f" and from {last}" if ours[-1] and last > MOST else ""))
    return ", ".join([*parts, "cuBLAS above" if parts and "from" not in parts[-1] else "cuBLAS"])


def _behind(product: str) -> str:
    """Return the kernel of an activation behind a product: all products' kernels but cuBLAS's do it themselves."""
    if product == "cuBLAS":
        return "gate_rows"
    if product.startswith("FP8"):
        return "in the product" + (", gate_codes behind the library's" if "library" in product else "")
    return "in the product" + (", gate_rows behind cuBLAS" if "cuBLAS" in product else "")


def _attention(op: ops.Attention, runs: str, options: KernelOptions) -> str:
    parts = ["norm"] * bool(op.q_norm) + ["rope"] * bool(op.rope)
    parts += [f"window of {op.window}"] * bool(op.window) + [f"chunks of {op.chunk}"] * bool(op.chunk)
    parts += ["cap"] * bool(op.softcap)
    parts += ["ALiBi"] * bool(op.alibi) + ["sinks"] * bool(op.sinks)
    of = f"heads of {op.head_dim}" + (f" with {', '.join(parts)}" if parts else "")
    if options.deterministic:
        return f"attend_tiles, {of}"
    tiles = "flashinfer's prefill" if runs == "flashinfer" else "attend_tiles"
    return f"single tokens decode {_splits(op, options)}, runs {tiles}; {of}"


def _latent(op: ops.LatentAttention, options: KernelOptions) -> str:
    of = f"{op.q.width // op.head_dim} heads, compressed rows of {op.latent.width} + {op.key.width}"
    if options.deterministic:
        return f"attend_rows, {of}"
    return f"single tokens attend_rows, runs attend_expanded; {of}"


def _splits(op: ops.Attention, options: KernelOptions) -> str:
    """Return the number of programs that share a sequence of a short context, by rows."""
    shared, window, kv_heads = op.q.width // op.k.width, op.window or op.chunk, op.k.width // op.head_dim
    by_rows = [
        decode_shape(
            rows, op.head_dim, shared, Contexts.ALIKE, options.item_bytes, window=window, kv_heads=kv_heads
        ).splits
        for rows in CLASSES
    ]
    return f"(split {_steps(by_rows, CLASSES)})"


def _steps(values: Sequence[int], mosts: Sequence[int]) -> str:
    """Return text such as "32 up to 4 rows, 4 up to 16, 1 above". Neighbours of the same value are merged."""
    ends = [i for i in range(len(values)) if i + 1 == len(values) or values[i] != values[i + 1]]
    parts = [f"{values[i]} up to {mosts[i]}{' rows' if i == ends[0] else ''}" for i in ends[:-1]]
    return ", ".join([*parts, f"{values[-1]} above" if parts else str(values[-1])])


def _other(op: Op, options: KernelOptions) -> str:
    if isinstance(op, ops.Norm):
        return "norm_heads" if op.head_dim else "norm_rows"
    if isinstance(op, ops.Experts):
        return _experts(op, options)
    if isinstance(op, recurrence.StateSpace | recurrence.DeltaRule):
        return _scan(op, options)
    if isinstance(op, encoded.EncoderAttention | encoded.DecoderAttention | encoded.CrossAttention):
        return _spans(op, options)
    return _NAMES.get(type(op), "torch")


def _experts(op: ops.Experts, options: KernelOptions) -> str:
    held = [options.held.get(ws[0]) for ws in (op.gate_up, op.down)]
    forms = [options.dtype if one is None else str(one) for one in held]
    form = f" ({'; '.join(dict.fromkeys(forms))})" if any(held) else ""
    if options.deterministic:
        return f"grouped at any number of rows{form}"
    up, down = ("coded_row" if one else "one_row" for one in held)
    return f"{up}_up, {down}_down, grouped above{form}"


def _spans(
    op: encoded.EncoderAttention | encoded.DecoderAttention | encoded.CrossAttention, options: KernelOptions
) -> str:
    bias = "" if isinstance(op, encoded.CrossAttention) else " with a bias by distance"
    of = f"heads of {op.head_dim}{bias}"
    if options.deterministic or isinstance(op, encoded.EncoderAttention):
        return f"attend_spans, {of}"
    splits = _steps([span_shape(rows).splits for rows in CLASSES], CLASSES)
    return f"single tokens attend_single (split {splits}), runs attend_spans; {of}"


def _scan(op: recurrence.StateSpace | recurrence.DeltaRule, options: KernelOptions) -> str:
    if isinstance(op, recurrence.DeltaRule):
        singles, runs = "correct_rows", "invert_blocks, ready_chunks, correct_chunks"
    elif op.a_log.columns:
        singles, runs = "scan_columns", "scan_column_chunks"
    else:
        singles, runs = "scan_heads", "ready_scan, scan_chunks"
    return f"{singles} for every token" if options.deterministic else f"single tokens {singles}, runs {runs}"
