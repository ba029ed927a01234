"""Every kind of operation in a few lines of torch: the reference that other backends are compared with.

There is a function for each kind, named after it: `(operation, step, *values it reads, in the order of its fields)`. A
fused kind runs its parts in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tokenmill.backends.torch import recurrence as recurrent
from tokenmill.backends.torch import special
from tokenmill.backends.torch.attention import attend, attend_latent
from tokenmill.backends.torch.experts import mixed, routed
from tokenmill.backends.torch.step_state import StepState
from tokenmill.program import ops, recurrence
from tokenmill.program.rope import RopeTable
from tokenmill.program.stage import Receive, Send

Act = Callable[[Tensor], Tensor]


def activation(name: str) -> Act:
    """Return an activation by its name in transformers."""
    acts: dict[str, Act] = {
        "silu": F.silu,
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "linear": lambda x: x,
        "relu": F.relu,
        "sigmoid": torch.sigmoid,
        "relu2": lambda x: F.relu(x).square(),
        "gelu": F.gelu,
        "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
        "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    }
    return acts[name]


def embed(op: ops.Embed, step: StepState, ids: Tensor) -> Tensor:
    """Look up rows of a table. With several ranks each looks up its own rows, and an AllReduce follows."""
    table = step.weights[op.table]
    if op.table.ranks == 1:
        y = F.embedding(ids[:, 0], table)
    else:
        local = ids[:, 0] - step.group.rank * len(table)
        mine = (local >= 0) & (local < len(table))
        y = F.embedding(local * mine, table) * mine[:, None]
    return y if op.scale == 1.0 else y * op.scale


def linear(op: ops.Linear, step: StepState, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Return act(x · weightᵀ + bias), gated, plus residual."""
    y = F.linear(x, step.weights[op.weight], step.optional(op.bias))
    if op.act and op.gated:
        gate, up = y.chunk(2, -1)
        y = activation(op.act)(gate) * up
    elif op.act:
        y = activation(op.act)(y)
    return y if residual is None else residual + y


def norm(op: ops.Norm, step: StepState, x: Tensor) -> Tensor:
    """Return the RMS norm or LayerNorm of each row or of each head."""
    return normed(x, step.optional(op.weight), step.optional(op.bias), op.eps, op.center, op.head_dim)


def add_norm(op: ops.AddNorm, step: StepState, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norm of the sum, and the sum."""
    total = x + y
    return norm(op, step, total), total


def rope(op: ops.Rope, step: StepState, x: Tensor) -> Tensor:
    """Rotate heads by position."""
    return rotated(x, op.rope, op.head_dim, step)


def attention(op: ops.Attention, step: StepState, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Normalize and rotate queries and keys, write the cache, and attend."""
    if op.q_norm and op.k_norm:
        q, k = (
            normed(x, step.weights[w], None, op.eps, False, op.head_dim) for x, w in ((q, op.q_norm), (k, op.k_norm))
        )
    if op.rope:
        q, k = (rotated(x, op.rope, op.head_dim, step) for x in (q, k))
    heads = q.shape[1] // op.head_dim
    slopes = op.alibi[step.group.rank * heads :][:heads]
    alibi = torch.tensor(slopes, dtype=q.dtype, device=q.device) if slopes else None
    plan, sinks = step.attention[op.layer], step.optional(op.sinks)
    return attend(op, q, k, v, step.cache[op.layer], plan, step.scratch, alibi, sinks)


def latent_attention(op: ops.LatentAttention, step: StepState, q: Tensor, latent: Tensor, key: Tensor) -> Tensor:
    """Rotate queries and the key, write the cache, and attend."""
    turned = op.key.width
    heads = q.view(len(q), -1, op.head_dim)
    plain, last = heads[..., : op.head_dim - turned], heads[..., op.head_dim - turned :].flatten(1)
    if op.rope and op.interleaved:  # to halves, which changes no product of queries and keys
        last, key = (x.reshape(len(x), -1, turned // 2, 2).transpose(-1, -2).flatten(1) for x in (last, key))
    if op.rope:
        last, key = (rotated(x, op.rope, turned, step) for x in (last, key))
    heads = torch.cat([plain, last.view(*heads.shape[:2], -1)], -1)
    weight, cache = step.weights[op.expand], step.cache[op.layer]
    return attend_latent(op, heads, latent, key, weight, cache, step.attention[op.layer], step.scratch)


def gated_act(op: ops.GatedAct, step: StepState, gate: Tensor, up: Tensor) -> Tensor:
    """Return act(gate) · up."""
    return activation(op.act)(gate) * up


def act(op: ops.Act, step: StepState, x: Tensor) -> Tensor:
    """Return act(x)."""
    return activation(op.act)(x)


def add(op: ops.Add, step: StepState, x: Tensor, y: Tensor) -> Tensor:
    """Return x + y."""
    return x + y


def scale(op: ops.Scale, step: StepState, x: Tensor) -> Tensor:
    """Return x · factor."""
    return x * op.factor


def soft_cap(op: ops.SoftCap, step: StepState, x: Tensor) -> Tensor:
    """Return cap · tanh(x / cap)."""
    return op.cap * torch.tanh(x / op.cap)


def take_rows(op: ops.TakeRows, step: StepState, x: Tensor) -> Tensor:
    """Return the rows that sample."""
    return x[step.samples]


def route(op: ops.Route, step: StepState, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ids of each row's experts, and their factors."""
    weight, bias = step.weights[op.weight].float(), step.optional(op.bias)
    logits = F.linear(x.float(), weight, None if bias is None else bias.float())
    correction = step.optional(op.correction)
    ids, factors = routed(op, logits, None if correction is None else correction.float())
    return ids, factors.to(x.dtype)


def experts(op: ops.Experts, step: StepState, x: Tensor, ids: Tensor, factors: Tensor) -> Tensor:
    """Return the sum of the chosen experts' outputs."""
    first = step.group.rank * len(op.down) if op.shard == "part" else 0
    return mixed(op, x, ids, factors, step.weights, activation(op.act), first)


def causal_conv(op: recurrence.CausalConv, step: StepState, x: Tensor) -> Tensor:
    """Convolve each row's tokens after the last inputs of its slot."""
    y = recurrent.causal_conv(op, step.recurrent, step.weights, x)
    return activation(op.act)(y) if op.act else y


def state_space(op: recurrence.StateSpace, step: StepState, x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Continue the scan of each row from the state of its slot."""
    return recurrent.state_space(op, step.recurrent, step.weights, x, dt, b, c)


def delta_rule(
    op: recurrence.DeltaRule, step: StepState, v: Tensor, q: Tensor, k: Tensor, a: Tensor, b: Tensor
) -> Tensor:
    """Continue the delta rule of each row from the state of its slot."""
    return recurrent.delta_rule(op, step.recurrent, step.weights, v, q, k, a, b)


def rg_lru(op: recurrence.RgLru, step: StepState, x: Tensor) -> Tensor:
    """Continue the recurrent unit of each row from the state of its slot."""
    return recurrent.rg_lru(op, step.recurrent, step.weights, x)


def quantize(op: ops.Quantize, step: StepState, x: Tensor) -> Tensor:
    """Return x: values written to an int8 buffer are rounded there."""
    return x


def all_reduce(op: ops.AllReduce, step: StepState, x: Tensor) -> Tensor:
    """Return the sum over the ranks."""
    return step.group.all_reduce(x)


def gather(op: ops.Gather, step: StepState, x: Tensor) -> Tensor:
    """Return the columns of all ranks side by side, without those that are padding."""
    return step.group.gather(x)[:, : op.out.width]


def send(op: Send, step: StepState, x: Tensor) -> Tensor:
    """Send a value to the next stage. The result is not used."""
    assert step.stages is not None
    step.stages.send(x.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return x[:, :1]


def receive(op: Receive, step: StepState) -> Tensor:
    """Return a value of the stage before."""
    assert step.stages is not None
    x = torch.empty((len(step.positions), op.out.width), dtype=step.dtype)
    step.stages.receive(x.view(torch.uint8).numpy().data)
    return x.to(step.positions.device)


def arg_max(op: ops.ArgMax, step: StepState, x: Tensor) -> Tensor:
    """Return the index of the largest value of each row."""
    return x.argmax(-1, keepdim=True)


def normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, center: bool, head_dim: int) -> Tensor:
    """Return the norm in x's dtype, computed in float32. Weight and bias: of a head, or of all heads."""
    y = x.float()
    if head_dim:
        y = y.reshape(len(x), -1, head_dim)
    if center:
        y = y - y.mean(-1, keepdim=True)
    y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    if weight is not None:
        y = y * weight.view(-1, y.shape[-1])
    if bias is not None:
        y = y + bias.view(-1, y.shape[-1])
    return y.flatten(1)


def rotated(x: Tensor, table: RopeTable, head_dim: int, step: StepState) -> Tensor:
    """Rotate the first rotary_dim of each head of x (T, heads · head_dim), in split halves or adjacent pairs."""
    cos, sin = step.cos_sin(table, x.dtype)
    half = table.rotary_dim // 2
    heads = x.reshape(len(x), -1, head_dim)
    if table.interleaved:
        a, b, rest = heads[..., : 2 * half : 2], heads[..., 1 : 2 * half : 2], heads[..., 2 * half :]
        pairs = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        return torch.cat([pairs, rest], -1).flatten(1)
    a, b, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1).flatten(1)


def rounded(x: Tensor) -> Tensor:
    """Return x after rounding to int8 codes with a scale per 32 columns."""
    blocks = x.reshape(len(x), -1, 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / scale.clamp(min=1e-30)).round() * scale).flatten(1)


def kernels() -> dict[type[ops.Op], Callable[..., Any]]:
    """Return the function of each kind."""
    return {
        ops.Embed: embed,
        ops.Linear: linear,
        ops.Norm: norm,
        ops.AddNorm: add_norm,
        ops.Rope: rope,
        ops.Attention: attention,
        ops.LatentAttention: latent_attention,
        ops.GatedAct: gated_act,
        ops.Act: act,
        ops.Add: add,
        ops.Scale: scale,
        **special.KERNELS,
        ops.SoftCap: soft_cap,
        ops.TakeRows: take_rows,
        ops.Route: route,
        ops.Experts: experts,
        ops.Quantize: quantize,
        ops.AllReduce: all_reduce,
        ops.Gather: gather,
        ops.ArgMax: arg_max,
        Send: send,
        Receive: receive,
        recurrence.CausalConv: causal_conv,
        recurrence.StateSpace: state_space,
        recurrence.DeltaRule: delta_rule,
        recurrence.RgLru: rg_lru,
    }
