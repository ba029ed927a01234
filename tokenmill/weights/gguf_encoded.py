"""GGUF's architectures that are an encoder and a decoder: names of their tensors and keys, as data."""

from __future__ import annotations

from tokenmill.weights.gguf_architecture import Architecture, within

_RENAMED = {
    "hidden_size": "d_model", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
    "intermediate_size": "d_ff", "head_dim": "d_kv", "max_position_embeddings": "n_positions",
}  # fmt: skip


def _attention(part: str, kind: str, own: str, place: int, theirs: str) -> dict[str, str]:
    """Return the names of an attention, its norm and its bias by distance.

    `part`: "enc" or "dec". `place`: of the attention within a layer.
    """
    layers, module = f"{kind}.block", f"layer.{place}.{theirs}"
    names = {f"{part}.{own}_{name}": f"{module}.{name}" for name in "qkvo"}
    names |= {f"{part}.{own}_rel_b": f"{module}.relative_attention_bias"}
    return within(layers, **names, **{f"{part}.{own}_norm": f"layer.{place}.layer_norm"})


def _feed_forward(part: str, kind: str, place: int, **products: str) -> dict[str, str]:
    names = {f"{part}.ffn_{name}": f"layer.{place}.DenseReluDense.{theirs}" for name, theirs in products.items()}
    return within(f"{kind}.block", **names, **{f"{part}.ffn_norm": f"layer.{place}.layer_norm"})


def _t5(model_type: str, feed_forward: str, **products: str) -> Architecture:
    """Return T5 or a relative. `products`: name in the file of one of a feed-forward layer -> transformers' name."""
    names = {
        "token_embd": "shared", "output": "lm_head",
        "enc.output_norm": "encoder.final_layer_norm", "dec.output_norm": "decoder.final_layer_norm",
        **_attention("enc", "encoder", "attn", 0, "SelfAttention"), **_feed_forward("enc", "encoder", 1, **products),
        **_attention("dec", "decoder", "attn", 0, "SelfAttention"),
        **_attention("dec", "decoder", "cross_attn", 1, "EncDecAttention"),
        **_feed_forward("dec", "decoder", 2, **products),
    }  # fmt: skip
    return Architecture(
        model_type, names, renamed=_RENAMED, eps="layer_norm_epsilon", ignored=("attention.layer_norm_epsilon",),
        fields={"relative_attention_num_buckets": "attention.relative_buckets_count",
                "decoder_start_token_id": "decoder_start_token_id", "num_decoder_layers": "decoder_block_count"},
        constants={"relative_attention_max_distance": 128, "feed_forward_proj": feed_forward,
                   "is_encoder_decoder": True},
    )  # fmt: skip


ARCHITECTURES: dict[str, Architecture] = {
    "t5": _t5("t5", "relu", up="wi", down="wo"),
    "t5 with gates": _t5("t5", "gated-gelu", gate="wi_0", up="wi_1", down="wo"),
    "t5 with biases": _t5("umt5", "gated-gelu", gate="wi_0", up="wi_1", down="wo"),
}
"""general.architecture, with what distinguishes two kinds of files -> counterpart.

llama.cpp has the largest distance of the bias, and the activations, in its code.
"""
