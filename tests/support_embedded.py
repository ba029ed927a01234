"""An independent reference for the embedded model: its GGUF read by the `gguf` package, run by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo GGUF's order of the rows of a head: interleaved pairs become first halves, then second halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def reference_model(path: Path) -> Any:
    """Return transformers' Llama in float32 over the dequantized tensors of the GGUF file at `path`."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(str(path))
    value = {name.removeprefix("llama."): field.contents() for name, field in reader.fields.items()}
    heads, kv_heads = value["attention.head_count"], value["attention.head_count_kv"]
    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        weight = np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)
        stem, _, rest = tensor.name.removesuffix(".weight").removeprefix("blk.").partition(".")
        if "attn_q" in tensor.name or "attn_k" in tensor.name:
            weight = halves(weight, heads if "attn_q" in tensor.name else kv_heads)
        state[(f"model.layers.{stem}.{NAMES[rest]}" if rest else TOP[stem]) + ".weight"] = torch.from_numpy(
            np.ascontiguousarray(weight)
        )
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    config = LlamaConfig(
        hidden_size=value["embedding_length"],
        intermediate_size=value["feed_forward_length"],
        num_hidden_layers=value["block_count"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=state["model.embed_tokens.weight"].shape[0],
        rms_norm_eps=value["attention.layer_norm_rms_epsilon"],
        rope_theta=value["rope.freq_base"],
        max_position_embeddings=value["context_length"],
        tie_word_embeddings="output.weight" not in {t.name for t in reader.tensors},
        attn_implementation="eager",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True, strict=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are not weights
    return model.eval()


@torch.inference_mode()
def behind(model: Any, prompt_ids: list[int], ids: list[int]) -> list[float]:
    """Return by how many logits each of `ids`, which follow the prompt, is below the likeliest token."""
    logits = model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
    return [float(row.max() - row[token]) for row, token in zip(logits, ids, strict=True)]


@torch.inference_mode()
def likeliest(model: Any, prompt_ids: list[int], ids: list[int]) -> tuple[list[int], list[float]]:
    """Return the likeliest token at the place of each of `ids`, and its lead in logits over the second.

    `ids` follow the prompt.
    """
    top = model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1].topk(2)
    return top.indices[:, 0].tolist(), (top.values[:, 0] - top.values[:, 1]).tolist()
