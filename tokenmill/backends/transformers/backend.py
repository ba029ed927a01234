"""The torch backend with a model of transformers as its body and head.

The model's attention is replaced by a function that writes keys and values to the paged cache and attends there. A step
is one call with all its tokens as one sequence, (1, tokens), and the position of each.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.logging import disable_progress_bar

from tokenmill.backends.base import Admitted, StepInputs
from tokenmill.backends.kind import Job
from tokenmill.backends.torch.attention import attend
from tokenmill.backends.torch.backend import TorchBackend
from tokenmill.backends.torch.step_state import StepState
from tokenmill.backends.transformers.library import class_of, config_of, parts_of
from tokenmill.errors import ModelError, Unsupported
from tokenmill.program.foreign import TransformersAttention, TransformersBody, TransformersHead, body_of
from tokenmill.program.ops import Op
from tokenmill.weights.checkpoint import Checkpoint
from tokenmill.wire.messages import Progress, Request, SamplingParams, StoppingParams

_NAME = "tokenmill"
_KINDS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
          "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool}  # fmt: skip
_WIDTHS = 8  # values as wide as the widest that a layer holds at once: an estimate
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}  # of the largest logit

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Calls:
    """The calls of attention of one step: those that follow, in the order of the program."""

    step: StepState
    ops: list[TransformersAttention]
    done: int = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        """Compute the next call, on (1, heads, tokens, head size). Return (1, tokens, heads, size of a value)."""
        op = self.ops[self.done]
        self.done += 1
        cache = self.step.cache[op.layer]
        q, k, v = (
            pad(t[0].transpose(0, 1), (0, op.head_dim - t.shape[-1])).flatten(1).to(cache.dtype)
            for t in (query, key, value)
        )
        y = attend(op, q, k, v, cache, self.step.attention[op.layer], self.step.scratch, sinks=sinks)
        heads = y.view(len(y), op.heads, op.head_dim)[..., : op.value_dim]
        return heads[None].to(query.dtype)


_calls: ContextVar[_Calls] = ContextVar("calls of attention")


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **arguments: Any
) -> tuple[Tensor, None]:
    """Attend in the cache of the step that this thread computes; transformers' interface."""
    return _calls.get().attend(query, key, value, arguments.get("s_aux")), None


class TransformersBackend(TorchBackend):
    """Implements `backends.base.Backend` for a program that `record.py` recorded."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._calls = [op for op in self.program.ops if isinstance(op, TransformersAttention)]
        divides = any(isinstance(op, TransformersHead) for op in self.program.ops)
        body = body_of(self.program)
        assert body is not None
        self._op, self._model = body, load(body, job, self.dtype, self.device)
        parts = parts_of(self._model)
        self._body_part, self._head_part = parts.body if divides else parts.whole, parts.head
        self._whole = parts.whole

    def more_kernels(self) -> Mapping[type[Op], Callable[..., Any]]:
        """Return the kernels of the three kinds of operations."""
        return {
            TransformersAttention: lambda op, step, ids: ids,
            TransformersBody: self._body,
            TransformersHead: lambda op, step, x: self._head_part(x[None])[0],
        }

    def more_bytes(self) -> int:
        """Return the bytes of values inside of a layer."""
        return _WIDTHS * self.limits.max_batch_tokens * self._op.widest * self.dtype.itemsize

    def warm_up(self) -> None:
        """Compare the logits with those of transformers' own attention, then warm up as the torch backend does.

        Raise Unsupported if they differ: the model looks at other tokens than through its attention.
        """
        self._thread.submit(self._compare).result()
        super().warm_up()

    def _body(self, op: TransformersBody, step: StepState, ids: Tensor) -> Tensor:
        token = _calls.set(_Calls(step, self._calls))
        try:
            return self._body_part(ids.view(1, -1), step.positions[None])[0]
        finally:
            _calls.reset(token)

    @torch.inference_mode()
    def _compare(self) -> None:
        """Compute two sequences in three steps, and each of them at once with transformers' own attention."""
        sizes = _rehearsal(self.limits.max_batch_size, self.limits.max_batch_tokens, self.limits.max_total_tokens,
                           self.num_blocks * self.limits.block_size // len(self.windows))  # fmt: skip
        if not sizes:
            return
        random = np.random.default_rng(0)
        prompts = [random.integers(0, self.vocab_size, sum(parts)).tolist() for parts in sizes]
        found = [self._paged(prompts, step, sizes) for step in range(len(sizes[0]))][-1]
        self._model.set_attn_implementation("eager")
        try:
            expected = [self._own(ids) for ids in prompts]
        finally:
            self._model.set_attn_implementation(_NAME)
        for ours, own in zip(found, expected, strict=True):
            difference = float((ours - own).abs().max() / own.abs().max().clamp(min=1e-6))
            if not difference <= _TOLERANCE[self.dtype]:
                raise Unsupported(
                    "model type", self._op.model_type, (),
                    "transformers defines it, but its logits with tokenmill's attention differ from those with its own "
                    f"(by {difference:.2g} of the largest): it sees other tokens in another way than by attention, or "
                    "counts positions itself. Serve a model type of docs/models.md.",
                )  # fmt: skip
        self._slots.tables.zero_()
        for cache in self._cache.values():
            cache.zero_()

    def _own(self, ids: list[int]) -> Tensor:
        """Return the logits of the last token with transformers' own attention."""
        given = torch.tensor([ids], device=self.device)
        return self._whole(given, torch.arange(len(ids), device=self.device)[None])[0, -1].float()

    def _paged(self, prompts: list[list[int]], number: int, sizes: list[tuple[int, ...]]) -> Tensor:
        """Return the logits of the last tokens of one step of the comparison."""
        starts = [sum(parts[:number]) for parts in sizes]
        block = self.limits.block_size
        blocks: list[tuple[int, int, int, int]] = []
        slots = np.arange(len(prompts), dtype=np.int32)
        if number == 0:
            needed = -(-max(map(len, prompts)) // block)
            for table in range(len(self.windows)):
                blocks += [
                    (table, slot, i, (table * len(prompts) + slot) * needed + i)
                    for slot in slots.tolist() for i in range(needed)
                ]  # fmt: skip
        admitted = tuple(
            Admitted(slot, Request(slot, tuple(ids), SamplingParams(), StoppingParams(1)), np.array(ids, np.int32))
            for slot, ids in enumerate(prompts) if number == 0
        )  # fmt: skip
        inputs = StepInputs(
            slots, np.array(starts, np.int32), np.array([parts[number] for parts in sizes], np.int32), slots, admitted,
            np.array(blocks, np.int32).reshape(-1, 4),
        )  # fmt: skip
        self._slots.apply(inputs)
        state, ids = self._state(inputs)
        return self._interpreter.tail(state, self._interpreter.body(state, ids)).float()


def _rehearsal(slots: int, tokens: int, longest: int, places: int) -> list[tuple[int, ...]]:
    """Return the tokens of each step of each sequence of a comparison that fits into a backend; none if none does."""
    sizes = list[tuple[int, ...]]([(7, 1, 5), (4, 3, 1)])[:slots]
    fits = all(sum(parts) <= min(longest, places // (2 * len(sizes))) for parts in sizes)
    return sizes if fits and max(map(sum, zip(*sizes, strict=True))) <= tokens else []


def load(op: TransformersBody, job: Job, dtype: torch.dtype, device: torch.device) -> Any:
    """Return transformers' model with the weights of a checkpoint. Raise ModelError if they do not fit it."""
    source = job.source
    total = sum(source.nbytes(name) for name in source.names())
    job.report(Progress("load", 0, total))
    config = config_of(source.config, op.code)
    kind = class_of(source.config, config, op.code)
    quiet: Any = disable_progress_bar  # whose types are not declared
    quiet()
    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
    try:
        model, found = kind.from_pretrained(
            None, config=config, state_dict=tensors_of(source), dtype=dtype, attn_implementation=_NAME,
            output_loading_info=True,
        )  # fmt: skip
    except (RuntimeError, ValueError, KeyError) as error:
        raise ModelError(f"transformers cannot load the model's weights: {error}") from error
    if missing := sorted(found["missing_keys"]):
        raise ModelError(f"The weights have no tensor {missing[0]!r}, which transformers' model needs.")
    if unread := sorted(found["unexpected_keys"]):
        _log.warning("The model does not read %d of the tensors in its files: %s.", len(unread), ", ".join(unread[:5]))
    job.report(Progress("load", total, total))
    return model.to(device).eval()


def tensors_of(source: Checkpoint) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, without copies. ModelError for one of an unknown kind."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the file cannot be written to
        for name in source.names():
            stored = source[name]
            if stored.kind not in _KINDS:
                raise ModelError(f"transformers cannot load the tensor {name!r}: it is of the kind {stored.kind}.")
            bytes_ = torch.from_numpy(np.ascontiguousarray(stored.data).reshape(-1))
            found[name] = bytes_.view(_KINDS[stored.kind]).reshape(stored.shape)
    return found
