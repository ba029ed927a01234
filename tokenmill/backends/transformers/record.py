"""Record a model that transformers defines: the fallback for model types that have no file in `models/`.

transformers' model is built without memory for its weights (on torch's meta device) and called once. Each call of
attention is recorded, with the mask that the model wants there. A model is refused if it cannot be computed call by
call with the keys and values of a cache: the message names the reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokenmill.backends.transformers.library import class_of, config_of, first_line, parts_of
from tokenmill.errors import ModelError, StartError, Unsupported
from tokenmill.program.foreign import TransformersAttention, TransformersBody, TransformersHead
from tokenmill.program.ops import TakeRows
from tokenmill.program.value import Inputs, Program, Tape, Value

TOKENS = 5
"""Number of tokens of the recorded call."""

_RECORDING = "tokenmill-recording"
_CURE = "Serve a model type of docs/models.md."
_HARMLESS = {
    "dropout", "position_ids", "use_cache", "output_router_logits", "output_attentions", "output_hidden_states",
    "logits_to_keep", "return_dict", "cache_position", "scaling", "sliding_window", "softcap", "s_aux", "is_causal",
    "past_key_values", "layer_idx",
}  # fmt: skip
"""Arguments of attention that change nothing here, or that are recorded."""

_STATES = ("mamba", "linear_attention", "conv", "recurrent", "hybrid")


class Call(NamedTuple):
    """A call of attention: shapes (batch, heads, tokens, head size), the mask and the other arguments."""

    query: torch.Size
    key: torch.Size
    value: torch.Size
    mask: Any
    causal: bool
    arguments: dict[str, Any]


class Recorder:
    """transformers' functions of attention and of masks during the recorded call."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.masks: dict[int, Callable[..., Any]] = {}  # by id of the tensor that stands for the mask
        self._held: list[Tensor] = []

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **arguments: Any
    ) -> tuple[Tensor, None]:
        """Record a call and return a result of the right shape."""
        given = {name: argument for name, argument in arguments.items() if argument is not None}
        causal = bool(given.get("is_causal", getattr(module, "is_causal", True)))
        mask = self.masks.get(id(attention_mask)) if attention_mask is not None else None
        if attention_mask is not None and mask is None:
            raise _refused("its attention has a mask that is made from its numbers")
        self.calls.append(Call(query.shape, key.shape, value.shape, mask, causal, given))
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    def mask(self, *, mask_function: Callable[..., Any], **_: Any) -> Tensor:
        """Return a tensor that stands for a mask."""
        made = torch.zeros(1, 1, TOKENS, TOKENS, device="meta")
        self._held.append(made)
        self.masks[id(made)] = mask_function
        return made


def record(config: dict[str, Any], code: str) -> tuple[Program, int]:
    """Return the program of a model, and the maximum length of a sequence. Needs no weights.

    `code`: folder whose Python files define the model; "": transformers defines it. Raises Unsupported with the
    reason if the model cannot be served in this way.
    """
    theirs = config_of(config, code)
    recorder, name = Recorder(), str(config["model_type"])
    ALL_ATTENTION_FUNCTIONS.register(_RECORDING, recorder.attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_RECORDING, recorder.mask)
    try:
        _check_kind(theirs)
        model = _empty(theirs, config, code)
        length = min(_length(theirs), *_fixed_lengths(model))
        body, widest = _body(model)
        program = _program(name, code, model, body, [_layer(call, length) for call in recorder.calls], widest)
    except StartError as error:
        raise Unsupported("model type", name, (), f"{error} {_CURE}") from error
    except Exception as error:  # of code that was never meant to run without numbers
        why = f"transformers' model cannot be called without numbers ({type(error).__name__}: {first_line(error)})."
        raise Unsupported("model type", name, (), f"{why} {_CURE}") from error
    return program, length


def _refused(why: str) -> ModelError:
    return ModelError(f"transformers defines it, but {why}.")


def _check_kind(theirs: Any) -> None:
    """Raise ModelError for a model that is no decoder, or that keeps something else than keys and values."""
    if getattr(theirs, "is_encoder_decoder", False):
        raise _refused("it is an encoder and a decoder, and the fallback serves decoders only")
    kinds = getattr(theirs, "layer_types", None) or ()
    states = sorted({kind for kind in kinds if any(part in str(kind) for part in _STATES)})
    if states:
        raise _refused(f"its layers of {', '.join(states)} keep a state that only its own cache holds")


def _empty(theirs: Any, config: dict[str, Any], code: str) -> Any:
    """Return the model without memory for its weights. Raises ModelError if its attention cannot be replaced."""
    kind = class_of(config, theirs, code)
    if getattr(kind, "_is_stateful", False):
        raise _refused("its layers keep a state that only its own cache holds")
    if not getattr(kind, "_supports_attention_backend", False):
        raise _refused("its attention cannot be replaced (its class does not have _supports_attention_backend)")
    theirs._experts_implementation = "batched_mm"  # the other ones look at the choice of experts
    with torch.device("meta"):
        return kind._from_config(theirs, attn_implementation=_RECORDING).eval()


def _length(theirs: Any) -> int:
    """Return the maximum length of a sequence."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length"):
        value = getattr(theirs, name, None)
        if isinstance(value, int) and value > 0:
            return value
    raise _refused("its configuration names no max_position_embeddings; add that to config.json")


def _fixed_lengths(model: Any) -> list[int]:
    """Return the length of each rotation up to which it does not depend on the longest sequence of a step.

    Below that length, a rotation that depends on it is made the default one, which does not look at positions.
    """
    found = [1 << 40]
    for module in model.modules():
        named = getattr(module, "rope_type", None)
        kinds = set(named.values()) if isinstance(named, dict) else {named}
        if not kinds & {"dynamic", "longrope"}:
            continue
        module.rope_type = dict.fromkeys(named, "default") if isinstance(named, dict) else "default"
        scaling = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
        before = scaling.get("original_max_position_embeddings") or getattr(module, "original_max_seq_len", None)
        if not isinstance(before, int):
            raise _refused("its rotation depends on the longest sequence of a step")
        found.append(before)
    return found


def _body(model: Any) -> tuple[tuple[int, int | None], int]:
    """Call the model. Return the width of its body's result, that of the logits of its head, and the widest inside.

    The second is None if the model does not divide into the two; the first is that of the logits then.
    """
    widths, hidden = [1], [0]

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 3:
            widths.append(output.shape[-1])
        if module is model.base_model and module is not model:
            hidden[0] = int(getattr(output, "last_hidden_state", output).shape[-1])

    hooks = [module.register_forward_hook(look) for module in model.base_model.modules()]
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    positions = torch.arange(TOKENS, device="meta")[None]
    # A mask of the caller is what keeps transformers from looking for several sequences in the positions.
    made = model(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False)
    for hook in hooks:
        hook.remove()
    logits = int(made.logits.shape[-1])
    divides = False
    if hidden[0]:
        with contextlib.suppress(Exception):  # a head that asks more of the body than its result
            rows = torch.zeros(1, 2, hidden[0], device="meta", dtype=made.logits.dtype)
            divides = tuple(parts_of(model).head(rows).shape) == (1, 2, logits)
    return ((hidden[0], logits) if divides else (logits, None)), max(widths)


def _layer(call: Call, length: int) -> dict[str, Any]:
    """Return the fields of `TransformersAttention`. Raises ModelError for attention that is not causal attention."""
    batch, heads, tokens, key_dim = call.query
    unknown = sorted(call.arguments.keys() - _HARMLESS)
    if unknown:
        raise _refused(f"its attention has {', '.join(unknown)}, which the attention here does not")
    if batch != 1 or tokens != TOKENS or call.key[2] != TOKENS or call.key[3] != key_dim or heads % call.key[1]:
        shapes = f"{tuple(call.query)} to {tuple(call.key)}"
        raise _refused(f"it attends from {shapes}, which is no attention of tokens to their own past")
    if call.mask is None and not call.causal:
        raise _refused("its attention is not causal")
    window = int(call.arguments.get("sliding_window") or 0) if call.mask is None else _window(call.mask, length)
    return {
        "heads": heads, "kv_heads": call.key[1], "key_dim": key_dim, "value_dim": call.value[3],
        "scale": float(call.arguments.get("scaling") or key_dim**-0.5), "window": 0 if window >= length else window,
        "softcap": float(call.arguments.get("softcap") or 0),
    }  # fmt: skip


def _window(mask: Callable[..., Any], length: int) -> int:
    """Return the sliding window of a mask; 0: none. Raises ModelError for a mask of another form."""
    keys = torch.arange(length)

    def seen(query: int) -> Tensor:
        found = torch.as_tensor(mask(torch.tensor(0), torch.tensor(0), torch.tensor(query), keys))
        return found.expand(length)

    window = int(seen(length - 1).sum())
    near = {at for base in (0, window, 2 * window, length) for at in range(base - 2, base + 3)}
    for query in sorted({at for at in near if 0 <= at < length} | set(range(0, length, max(1, length // 7)))):
        if not torch.equal(seen(query), (keys <= query) & (keys > query - window)):
            raise _refused("its attention has a mask that is neither causal nor a sliding window")
    return window if window < length else 0


def _program(
    name: str, code: str, model: Any, widths: tuple[int, int | None], layers: list[dict[str, Any]], widest: int
) -> Program:
    """Return the program of the recorded calls."""
    if not layers:
        raise _refused("its attention cannot be replaced (its layers do not call transformers' interface)")
    tape = Tape()
    inputs = Inputs(tape.new("tokens", 1, "ids"), tape.new("tokens", 1, "ids"))
    for number, fields in enumerate(layers):
        tape.record(TransformersAttention, "tokens", 1, ids=inputs.ids, layer=number, **fields)
    width, logits = widths
    count = sum(p.numel() for p in model.parameters())
    last = model.get_output_embeddings()
    own = sum(p.numel() for p in last.parameters()) if logits is not None and last is not None else 0
    x = tape.record(
        TransformersBody, "tokens", width, ids=inputs.ids, model_type=name, code=code, widest=widest,
        parameters=max(1, count - own),
    )  # fmt: skip
    out: Value = x.record(TakeRows, rows="samples", x=x)
    if logits is not None:
        out = out.record(TransformersHead, logits, x=out, parameters=own)
    return Program(tuple(tape.ops), inputs, {"logits": out})
