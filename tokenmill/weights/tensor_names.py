"""Names of tensors that a model type has in some checkpoints, and those that the models read."""

from __future__ import annotations

import re

_BLOCK = (r"\.mlp\.", ".block_sparse_moe.")
_LETTERS = (
    (r"\.experts\.(\d+)\.gate_proj\.", r".experts.\1.w1."),
    (r"\.experts\.(\d+)\.up_proj\.", r".experts.\1.w3."),
    (r"\.experts\.(\d+)\.down_proj\.", r".experts.\1.w2."),
)
_STACKED = (
    (r"\.experts\.gate_up_proj$", ".input_linear.weight"), (r"\.experts\.down_proj$", ".output_linear.weight"),
    (r"\.router\.weight$", ".router.layer.weight"),
)  # fmt: skip
_PATTERNS: dict[str, tuple[tuple[str, str], ...]] = {
    "exaone": (
        (r"^transformer\.wte\.", "model.embed_tokens."), (r"^transformer\.ln_f\.", "model.norm."),
        (r"^transformer\.h\.", "model.layers."), (r"\.attn\.attention\.out_proj\.", ".self_attn.o_proj."),
        (r"\.attn\.attention\.", ".self_attn."), (r"\.ln_1\.", ".input_layernorm."),
        (r"\.ln_2\.", ".post_attention_layernorm."), (r"\.c_fc_0\.", ".gate_proj."), (r"\.c_fc_1\.", ".up_proj."),
        (r"\.mlp\.c_proj\.", ".mlp.down_proj."),
    ),
    "exaone_moe": ((r"\.mlp\.e_score_correction_bias$", ".mlp.gate.e_score_correction_bias"),),
    "granitemoe": _STACKED,
    "granitemoe_swa": _STACKED,
    "granitemoehybrid": _STACKED,
    "granitemoeshared": _STACKED,
    "mixtral": (_BLOCK, *_LETTERS),
    "minimax_m2": (_BLOCK, *_LETTERS),
    "ernie4_5_moe": ((r"\.gate\.moe_statics\.", ".moe_statics."),),
    "nemotron_h": ((r"^model\.", "backbone."),),
    "phimoe": ((r"\.mlp\.router\.", ".mlp.gate."), _BLOCK, *_LETTERS),
    "lfm2_moe": _LETTERS,
    "olmo_hybrid": (
        (r"\.attention_layer_norm\.", ".input_layernorm."),
        (r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),
    ),
    "sarvam_moe": (
        (r"^model\.word_embeddings\.", "model.embed_tokens."), (r"\.attention\.dense\.", ".self_attn.o_proj."),
        (r"\.query_layernorm\.", ".q_norm."), (r"\.key_layernorm\.", ".k_norm."), (r"\.attention\.", ".self_attn."),
        (r"\.gate\.expert_bias$", ".gate.e_score_correction_bias"),
    ),
}  # fmt: skip
"""Model type -> patterns of other names, as the original files or transformers' memory have them, and the names read"""


def read_name(name: str, model_type: str) -> str:
    """Return the name under which a model of this type reads the tensor `name`."""
    for pattern, replacement in _PATTERNS.get(model_type, ()):
        name = re.sub(pattern, replacement, name)
    return name
