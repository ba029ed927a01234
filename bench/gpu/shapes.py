"""Data of the measurements: model shapes, workloads, goals, and reference figures."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336,
    "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    "bos_token_id": 128000, "eos_token_id": 128001, "torch_dtype": "bfloat16", "initializer_range": 0.02,
    "transformers_version": "5.0.0",
}  # fmt: skip
QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True, "intermediate_size": 6144,
    "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "tie_word_embeddings": False, "hidden_act": "silu", "bos_token_id": 151643, "eos_token_id": 151645,
    "torch_dtype": "bfloat16", "transformers_version": "5.0.0",
}  # fmt: skip
GPT_OSS_20B: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 24,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
    "num_experts_per_tok": 4, "intermediate_size": 2880, "vocab_size": 201088, "max_position_embeddings": 131072,
    "sliding_window": 128, "rope_theta": 150000.0, "tie_word_embeddings": False, "bos_token_id": 199998,
    "eos_token_id": 200002, "torch_dtype": "bfloat16", "transformers_version": "5.0.0",
}  # fmt: skip
QWEN3_NEXT: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "hidden_size": 2048,
    "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "num_experts": 512,
    "num_experts_per_tok": 10, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    "intermediate_size": 5120, "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "partial_rotary_factor": 0.25, "norm_topk_prob": True,
    "vocab_size": 151936, "max_position_embeddings": 262144, "rms_norm_eps": 1e-6, "rope_theta": 10000000.0,
    "tie_word_embeddings": False, "hidden_act": "silu", "bos_token_id": 151643, "eos_token_id": 151645,
    "torch_dtype": "bfloat16", "transformers_version": "5.0.0",
}  # fmt: skip
BAMBA_9B: dict[str, Any] = {
    "architectures": ["BambaForCausalLM"], "model_type": "bamba", "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "attn_layer_indices": [9, 18, 27],
    "mamba_n_heads": 128, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_d_conv": 4,
    "mamba_expand": 2, "vocab_size": 128256, "max_position_embeddings": 262144, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "hidden_act": "silu", "bos_token_id": 128000, "eos_token_id": 128001,
    "torch_dtype": "bfloat16", "transformers_version": "5.0.0",
}  # fmt: skip
DEEPSEEK_V2_LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_size": 2048,
    "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "kv_lora_rank": 512,
    "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
    "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1408, "intermediate_size": 10944,
    "first_k_dense_replace": 1, "topk_method": "greedy", "routed_scaling_factor": 1.0, "norm_topk_prob": False,
    "vocab_size": 102400, "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "rope_scaling": {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32,
                     "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707},
    "tie_word_embeddings": False, "hidden_act": "silu", "bos_token_id": 100000, "eos_token_id": 100001,
    "torch_dtype": "bfloat16", "transformers_version": "5.0.0",
}  # fmt: skip
GEMMA3_27B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 5376, "num_hidden_layers": 62,
    "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "intermediate_size": 21504,
    "query_pre_attn_scalar": 168, "sliding_window": 1024, "sliding_window_pattern": 6, "vocab_size": 262208,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1, "torch_dtype": "bfloat16",
    "transformers_version": "5.0.0",
}  # fmt: skip
FLAN_T5_LARGE: dict[str, Any] = {
    "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_model": 1024, "d_kv": 64, "d_ff": 2816,
    "num_layers": 24, "num_decoder_layers": 24, "num_heads": 16, "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6, "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128, "tie_word_embeddings": False, "decoder_start_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 0, "torch_dtype": "bfloat16", "transformers_version": "5.0.0",
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "8b": LLAMA_8B,
    "1b": LLAMA_8B | {"hidden_size": 2048, "num_hidden_layers": 16, "head_dim": 64, "intermediate_size": 8192,
                      "tie_word_embeddings": True},
    "30b-a3b": QWEN3_30B_A3B,
    "gpt-oss-20b": GPT_OSS_20B,
    "qwen3-next-small": QWEN3_NEXT | {"num_hidden_layers": 8},
    "bamba-9b": BAMBA_9B,
    "v2-lite": DEEPSEEK_V2_LITE,
    "gemma3-27b": GEMMA3_27B,
    "flan-t5-large": FLAN_T5_LARGE,
    "tiny": LLAMA_8B | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                        "head_dim": 16, "intermediate_size": 128, "vocab_size": 2048, "max_position_embeddings": 4096,
                        "bos_token_id": 1792, "eos_token_id": 1793},
}  # fmt: skip
"""Configurations in transformers' form. "tiny" is for tests without a GPU."""

BATCHES = (1, 8, 32, 64, 128, 256)


class Workload(NamedTuple):
    """Prompts as token ids, and the number of tokens of each answer."""

    prompts: list[list[int]]
    counts: list[int]


def crowd(requests: int, shortest: int = 100, longest: int = 1024, *, most_ids: int = 10000) -> Workload:
    """(a) Return `requests` prompts and answers of uniformly distributed lengths, the same on every call."""
    draw = random.Random(0)
    prompts = [[draw.randint(0, most_ids) for _ in range(draw.randint(shortest, longest))] for _ in range(requests)]
    return Workload(prompts, [draw.randint(shortest, longest) for _ in range(requests)])


def unshared(prompts: list[list[int]], seed: int, most_ids: int = 10000) -> list[list[int]]:
    """Replace the first tokens, so that no prompt matches a prefix cached by an earlier round.

    This includes rounds of other sizes with the same seed, which begin with the same prompts.
    """
    firsts = random.Random(f"{seed} of {len(prompts)}").sample(range(most_ids), len(prompts))
    return [[first, *prompt[1:]] for first, prompt in zip(firsts, prompts, strict=True)]


class Goal(NamedTuple):
    """Goal of a figure: at most (`less`) or at least `value`, times the peer's figure if `of_peer`."""

    value: float
    less: bool = True
    of_peer: bool = False

    def __str__(self) -> str:
        return f"{'≤' if self.less else '≥'} {self.value:,g}{' × peer' if self.of_peer else ''}"


def _decode(*ms: float) -> dict[str, Goal]:
    return {f"decode, batch {batch}": Goal(value) for batch, value in zip(BATCHES, ms, strict=True)}


GOALS: dict[str, dict[str, Goal]] = {
    "8b": {
        "crowd of 256": Goal(1.12, False, True), "prefill": Goal(1.04, False, True), "ready, kernels cached": Goal(12),
        "long prompt: p99 to quiet p99": Goal(3),
    },
    "1b": {
        "ready, kernels cached": Goal(8), "long prompt: p99 to quiet p99": Goal(3),
    },
}  # fmt: skip
"""Goals on any card: shape -> figure -> goal"""

H200_GOALS: dict[str, dict[str, Goal]] = {
    "8b": _decode(3.95, 4.45, 4.9, 5.65, 7.4, 11.9) | {"crowd of 256": Goal(11000, False)},
    "1b": _decode(0.88, 0.95, 1.16, 1.34, 1.78, 2.75)
    | {"crowd of 256": Goal(50000, False), "prefill": Goal(300000, False)},
}
"""Goals on an H200 only, which replace those above"""


def _row(*ms: float) -> dict[str, float]:
    return {f"decode, batch {batch}": value for batch, value in zip(BATCHES, ms, strict=True)}


H200_REFERENCES: dict[str, dict[str, dict[str, float]]] = {
    "study": {"8b": _row(3.87, 4.36, 4.83, 5.55, 7.24, 11.73), "1b": _row(0.851, 0.928, 1.125, 1.287, 1.711, 2.634)},
    "vLLM 0.26 earlier": {
        "8b": _row(4.91, 5.10, 5.74, 6.64, 8.53, 13.55) | {"crowd of 256": 9837, "prefill": 42660},
        "1b": _row(1.49, 1.57, 1.89, 2.49, 3.43, 5.07) | {"crowd of 256": 36865, "prefill": 247000},
    },
}
"""Figures measured on an H200 in other runs: a step on the device alone, and the peer"""
