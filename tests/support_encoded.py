"""Tiny random checkpoints of models that are an encoder and a decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {"vocab_size": 128, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 3}
GATED = {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu", "num_decoder_layers": 3}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", {"relative_attention_num_buckets": 16, "relative_attention_max_distance": 20}),
    "flan-t5": ("t5", GATED),
    "mt5": ("mt5", {}),
    "umt5": ("umt5", {"tie_word_embeddings": False}),
}
START = 0


def save(folder: Path, family: str = "t5", bias: float = 0.3, **changes: Any) -> Any:
    """Write a tiny random model. Return transformers' model of the same weights. `bias`: spread of those by distance;
    with 5 they weigh as much as products of queries and keys.
    """
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    kind, own = FAMILIES[family]
    fields = SIZES | own | changes
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, decoder_start_token_id=START, **fields))
    model = model.float().eval()
    for name, p in model.named_parameters():
        spread = bias if "relative_attention_bias" in name else 0.3
        p.data = torch.randn_like(p) * spread + (0.7 if p.dim() == 1 else 0)
    if family != "t5":  # those have an output matrix of their own, which transformers 5 ties when it makes a new model
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(torch.randn(fields["vocab_size"], 32) * 0.3)
    model.save_pretrained(folder)
    return model
