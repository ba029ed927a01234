"""The form in which an architecture of GGUF files is described, and the names that several architectures share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

_NUMBER = re.compile(r"\.(\d+)(?=\.)")
_SUFFIXES = (".weight", ".bias")

Fields = Mapping[str, Any]
"""The equivalent of config.json"""
Floats = NDArray[np.float32]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """Tensor of the file. `index`: the matrix of a stack of experts; None: not stacked."""

    name: str
    index: int | None = None


class Made(NamedTuple):
    """Tensor of transformers that is made of tensors of the file, all of one layer.

    `sources`: the file's names, without "blk.N."; none if it is made of the configuration. `shape`: from theirs.
    `rows`: the rows of the only source that it consists of, in order. Without `rows` it is `numbers(fields, arrays,
    layer)`. `copies`: the number of such tensors, if they are made of tensors outside of the layers; `layer` is then
    the number in its name.
    """

    sources: tuple[str, ...]
    shape: Callable[[Fields, Sequence[Shape]], Shape]
    rows: Callable[[Fields], NDArray[np.intp]] | None = None
    numbers: Callable[[Fields, Sequence[Floats], int], Floats] | None = None
    copies: Callable[[Fields], int] | None = None

    def names(self, layer: int) -> list[str]:
        """Return the file's names of the tensors that it is made of."""
        return [source if self.copies else f"blk.{layer}.{source}" for source in self.sources]


class Architecture(NamedTuple):
    """Counterpart of a `general.architecture` in transformers.

    `names`: a tensor's name in the file, without "blk.N." and mostly without the suffix, -> transformers' name. The
    first {} is the layer, the second one the expert. `fields`: field of config.json -> key, left out if the file lacks
    it. `constants`: fields that no key states. `renamed`: name in config.json of a field that all architectures have.
    `made`: transformers' name of a tensor, whole, with {} for the layer, -> the tensors that it is made of.
    """

    model_type: str
    names: Mapping[str, str]
    fields: Mapping[str, str] = {}
    constants: Mapping[str, Any] = {}
    renamed: Mapping[str, str] = {}
    made: Mapping[str, Made] = {}
    norm: str = "layer_norm_rms_epsilon"  # key of the norms' epsilon
    eps: str = "rms_norm_eps"  # and its field
    pairs: bool = False  # rows of a head's queries and keys are adjacent pairs, not halves
    by_head: bool = False  # transformers stores query, key and value of one head after another; the file, all queries
    above_one: bool = False  # transformers stores the weights of norms minus one
    as_stored: tuple[str, ...] = ()  # ends of the names of norms for which it does not
    partial: bool = False  # a part of a head may be rotated
    windows: bool = False  # `attention.sliding_window` is used
    heads: Literal["all", "some", "none"] = "all"  # layers whose attention heads are read by `gguf_config`
    widths: bool = False  # feed-forward layers may differ in width, which a function of `gguf_special` reads
    joined: tuple[str, ...] = ()  # ends of names of tensors that are gate and up in one
    alternate: bool = False  # in which their rows alternate
    both: Mapping[str, tuple[str, str]] = {}  # stack of gate and up of each expert -> the names of either
    below: tuple[str, ...] = ()  # ends of names of stacks whose matrices lie below each other in transformers
    sigmoid: bool = False  # experts are weighed by the sigmoid of their scores, not by the softmax
    scores_bias: str = ""  # field that is True if the products of queries, keys and values have a bias
    factors: tuple[str, ...] = ()  # tensors that `gguf_config` reads
    unscaled: Mapping[str, Any] | None = None  # `rope_scaling` of a file without, if None is another in transformers
    ignored: tuple[str, ...] = ()  # keys that concern images only

    def theirs(self, name: str) -> str | None:
        """Return transformers' name of a tensor of the file, {} being the expert; None if there is no such tensor."""
        layer = re.match(r"(?:(enc|dec)\.)?blk\.(\d+)\.", name)
        own = name[layer.end() :] if layer else name
        own = f"{layer[1]}.{own}" if layer and layer[1] else own
        stem, dot, suffix = own.rpartition(".")
        found = self.names.get(own) or (f"{self.names[stem]}{dot}{suffix}" if stem in self.names else None)
        if found is None or ("{}" in found) != (layer is not None):
            return None
        return found if layer is None else found.replace("{}", layer[2], 1)

    def ours(self, name: str) -> Found | None:
        """Return the file's tensor that has transformers' name `name`; None if there is no such tensor."""
        if (found := self._of_both(name)) is not None:
            return found
        stems = {there: here for here, there in self.names.items()}
        for count in (0, 1):  # numbers that are layer and expert; then one that is the layer, before others of a name
            numbers, suffix, template = _NUMBER.findall(name)[: count or None], "", _NUMBER.sub(".{}", name, count)
            if template not in stems:
                suffix = next((end for end in _SUFFIXES if template.endswith(end)), "")
                template = template.removesuffix(suffix)
            if template in stems and (suffix or "." in stems[template] or template.endswith(_SUFFIXES)):
                own = stems[template] + suffix
                index = int(numbers[1]) if len(numbers) > 1 else None
                return Found(_in_layer(numbers[0], own) if numbers else own, index)
        return None

    def theirs_of_both(self, name: str) -> tuple[str, ...]:
        """Return transformers' names of gate and up in a stack of both, {} being the expert; () for another tensor."""
        parts = name.split(".", 2)
        return tuple(own.replace("{}", parts[1], 1) for own in self.both.get(parts[-1], ()))

    def _of_both(self, name: str) -> Found | None:
        """Return the file's stack that has a gate or up beside the other one of each expert; None for another name."""
        template, numbers = _NUMBER.sub(".{}", name), _NUMBER.findall(name)
        for own, pair in self.both.items():
            if template in pair:
                return Found(_in_layer(numbers[0], own), 2 * int(numbers[1]) + pair.index(template))
        return None

    def made_of(self, name: str) -> tuple[Made, int] | None:
        """Return what a tensor of transformers is made of, and its layer; None if it is not made of others."""
        numbers = _NUMBER.findall(name)
        found = self.made.get(_NUMBER.sub(".{}", name)) if len(numbers) == 1 else None
        return None if found is None else (found, int(numbers[0]))


def _in_layer(layer: str, own: str) -> str:
    """Return the file's name of a tensor of a layer. `own`: without the layer, but with "enc." or "dec."."""
    part = own[:4] if own.startswith(("enc.", "dec.")) else ""
    return f"{part}blk.{layer}.{own.removeprefix(part)}"


def within(layer: str, **names: str) -> dict[str, str]:
    """Return names within layers: name in the file -> transformers' name."""
    return {stem: f"{layer}.{{}}.{name}" for stem, name in names.items()}


BODY = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ATTENTION = within(
    "model.layers", attn_q="self_attn.q_proj", attn_k="self_attn.k_proj", attn_v="self_attn.v_proj",
    attn_output="self_attn.o_proj",
)  # fmt: skip
GATED = within("model.layers", ffn_gate="mlp.gate_proj", ffn_up="mlp.up_proj", ffn_down="mlp.down_proj")
NORMS = within("model.layers", attn_norm="input_layernorm", ffn_norm="post_attention_layernorm")
HEAD_NORMS = within("model.layers", attn_q_norm="self_attn.q_norm", attn_k_norm="self_attn.k_norm")
FOUR_NORMS = within(
    "model.layers", attn_norm="input_layernorm", post_attention_norm="post_attention_layernorm",
    ffn_norm="pre_feedforward_layernorm", post_ffw_norm="post_feedforward_layernorm",
)  # fmt: skip
LATENT = within(
    "model.layers", attn_q_a="self_attn.q_a_proj", attn_q_a_norm="self_attn.q_a_layernorm",
    attn_q_b="self_attn.q_b_proj", attn_kv_a_mqa="self_attn.kv_a_proj_with_mqa",
    attn_kv_a_norm="self_attn.kv_a_layernorm", attn_kv_b="self_attn.kv_b_proj",
)  # fmt: skip
LAYER_INPUTS = {
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
    **within("model.layers", inp_gate="per_layer_input_gate", proj="per_layer_projection",
             post_norm="post_per_layer_input_norm"),
}  # fmt: skip
AFTER = within(
    "model.layers", post_attention_norm="post_attention_layernorm", post_ffw_norm="post_feedforward_layernorm"
)
EXPERTS = within(
    "model.layers", ffn_gate_inp="mlp.gate", ffn_gate_exps="mlp.experts.{}.gate_proj",
    ffn_up_exps="mlp.experts.{}.up_proj", ffn_down_exps="mlp.experts.{}.down_proj",
)  # fmt: skip
SHARED = within(
    "model.layers", ffn_gate_shexp="mlp.shared_experts.gate_proj", ffn_up_shexp="mlp.shared_experts.up_proj",
    ffn_down_shexp="mlp.shared_experts.down_proj",
)  # fmt: skip
WEIGHED_SHARED = within(
    "model.layers", ffn_gate_inp_shexp="mlp.shared_expert_gate", ffn_gate_shexp="mlp.shared_expert.gate_proj",
    ffn_up_shexp="mlp.shared_expert.up_proj", ffn_down_shexp="mlp.shared_expert.down_proj",
)  # fmt: skip
CORRECTION = {"exp_probs_b.bias": "model.layers.{}.mlp.gate.e_score_correction_bias"}
LLAMA = BODY | ATTENTION | GATED | NORMS
MIXTRAL = within(
    "model.layers", ffn_gate_inp="block_sparse_moe.gate", ffn_gate_exps="block_sparse_moe.experts.{}.w1",
    ffn_up_exps="block_sparse_moe.experts.{}.w3", ffn_down_exps="block_sparse_moe.experts.{}.w2",
)  # fmt: skip
SPARSE = {"num_experts_per_tok": "expert_used_count", "moe_intermediate_size": "expert_feed_forward_length"}
ROUTED = {
    **SPARSE,
    "n_routed_experts": "expert_count",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
}
MULTIPLIERS = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
LLAMA3, LONGROPE = ("rope_freqs.weight",), ("rope_factors_long.weight", "rope_factors_short.weight")
CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
