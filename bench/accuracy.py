"""Compare the results with a reference: `python -m bench.accuracy [--backend cpu] [--peers llamacpp openvino]`.

The reference is transformers in float32 on the weights that the `gguf` package dequantizes. Neither of them is code of
this project. Two things are measured:

* agreement: each engine answers the prompts greedily. For every token of an answer, the reference chooses a token after
  the same prefix. Where the two differ, the gap is the difference of the reference's logits of both tokens; a small gap
  is a near tie.
* perplexity of fixed texts, for this engine and the reference, and the differences of single log-probabilities.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from bench.peers import environments
from bench.peers.servers import LlamaCpp, Needs, OpenVino
from tokenmill.bench.client import Ask
from tokenmill.config import default_cache_dir
from tokenmill.host import usable_cpus
from tokenmill.llm import LLM
from tokenmill.weights import embedded

TEXTS = [*sorted((Path(__file__).parent / "texts").glob("*.txt")), Path(__file__).parent.parent / "LICENSE"]
QUESTIONS = (
    "Tell me about the history of Rome", "Write a short poem about the sea", "What is the capital of France",
    "Explain how a computer works", "How do plants make food", "Give me a recipe for bread",
    "Who was Albert Einstein", "List the planets of the solar system", "Why is the sky blue?",
    "Describe a day in the life of a baker", "What is the difference between a comet and an asteroid?",
    "Write a Python function that reverses a string", "How does a refrigerator work?",
    "Give three tips for learning a new language", "Translate to French: the cat sleeps on the chair",
    "What happens when water boils?", "Tell me a story about a lost dog", "What is 17 times 23?",
    "Explain democracy to a child", "Name five famous paintings and their painters", "How do I plant tomatoes?",
    "What are the main causes of the First World War?", "Write a letter to a friend about the summer",
    "Why do leaves change colour in autumn?", "What does a heart do?", "Describe the taste of coffee",
    "How is paper made?", "What is a prime number?", "Write an advertisement for an umbrella",
    "How can I sleep better?", "What was the Renaissance?", "Explain what an electric motor is",
)  # fmt: skip
_LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

Floats = NDArray[np.float64]
Generate = Callable[[list[list[int]], int], list[list[int]]]


def reference(path: Path) -> LlamaForCausalLM:
    """Load the dequantized model in float32. Supports GGUF files of Llama-like models only."""
    reader = GGUFReader(path)

    def field(name: str) -> Any:
        found = reader.fields.get(f"llama.{name}")
        return found.contents() if found is not None else None

    heads, kv_heads = field("attention.head_count"), field("attention.head_count_kv")
    tensors = {t.name: t for t in reader.tensors}
    tied = "output.weight" not in tensors
    config = LlamaConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]), hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"), num_hidden_layers=field("block_count"),
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"), rope_theta=field("rope.freq_base"),
        tie_word_embeddings=tied,
    )  # fmt: skip
    state = {}
    for name, tensor in tensors.items():
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        place, _, rest = name.partition(".")
        if place == "blk":
            layer, kind, _ = rest.split(".")
            if kind in ("attn_q", "attn_k"):  # GGUF interleaves the halves of each head
                count = heads if kind == "attn_q" else kv_heads
                weight = weight.reshape(count, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
            state[f"model.layers.{layer}.{_LAYER[kind]}.weight"] = weight
        else:
            state[f"{_OUTER[place]}.weight"] = weight
    model = LlamaForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - ({"lm_head.weight"} if tied else set()):
        raise SystemExit(f"the reference cannot be made of {path}: {missing} are missing, {unexpected} unexpected")
    model.tie_weights()
    return model


@torch.no_grad()
def agreement(model: LlamaForCausalLM, prompts: list[list[int]], answers: list[list[int]]) -> dict[str, Any]:
    """Count the tokens of `answers` that the reference would choose too, and collect its logit gaps at the others."""
    same, gaps = 0, []
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
        chosen = torch.tensor(answer)
        differ = logits.argmax(-1) != chosen
        same += int((~differ).sum())
        gap = logits.max(-1).values - logits.gather(-1, chosen[:, None])[:, 0]
        gaps += gap[differ].tolist()
    total = sum(map(len, answers))
    ordered = sorted(gaps)
    return {
        "tokens": total,
        "agreement": same / total,
        "gap_median": ordered[len(ordered) // 2] if ordered else 0.0,
        "gap_largest": ordered[-1] if ordered else 0.0,
    }


def logprobs(model: LlamaForCausalLM, llm: LLM, path: Path) -> tuple[Floats, Floats]:
    """Return the log-probabilities of a text's tokens from the second on, by this engine and by the reference."""
    ids = list(llm.tokenizer.encode(path.read_text(), add_special_tokens=False))
    (found,) = llm.generate([ids], max_new_tokens=1, prompt_logprobs=0, ignore_eos=True)
    mine = np.array([details.logprob for details in found.prompt_logprobs])
    with torch.no_grad():
        scores = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1].double(), -1)
    right = scores.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
    return mine, right


def compared(text: str, mine: Floats, right: Floats) -> dict[str, Any]:
    """Compare the log-probabilities of one text. `error`: standard error (one sigma) of `difference`."""
    ours, exact = math.exp(-mine.mean()), math.exp(-right.mean())
    return {
        "text": text,
        "tokens": len(mine),
        "perplexity": ours,
        "reference": exact,
        "difference": ours / exact - 1,
        "error": float((mine - right).std() / math.sqrt(len(mine))),
        "logprob_rms": float(np.sqrt(np.mean((mine - right) ** 2))),
    }


def by_llamacpp(gguf: Path, flash: bool) -> Generate:
    """Return a function that generates llama.cpp's greedy answers, through its native route with token ids."""

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        answers = []
        with LlamaCpp(gguf, flash, usable_cpus()).start(Needs(1, 1024)) as server:
            for prompt in prompts:
                body = {"prompt": prompt, "n_predict": new_tokens, "temperature": 0, "ignore_eos": True,
                        "return_tokens": True, "cache_prompt": False}  # fmt: skip
                request = urllib.request.Request(
                    server.base_url + "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
                )
                with urllib.request.urlopen(request) as answer:
                    answers.append(json.load(answer)["tokens"])
        return answers

    return generate


def by_openvino(gguf: Path) -> Generate:
    """Return a function that generates OpenVINO's greedy answers."""

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        with OpenVino(gguf, usable_cpus()).start(Needs(1, 1024)) as server:
            return [server.token_ids(Ask(prompt, new_tokens)) for prompt in prompts]

    return generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="", help="ours: cpu or torch; empty: its own choice")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="more options of LLM")
    parser.add_argument("--peers", nargs="*", default=["llamacpp", "openvino"], choices=list(environments.REQUIREMENTS))
    parser.add_argument("--prompts", type=int, default=len(QUESTIONS))
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    gguf = Path(embedded.resolve(default_cache_dir(), False, lambda _: None).path)
    model = reference(gguf)
    given = dict(pair.split("=", 1) for pair in options.option)
    with LLM(**given, **({"backend": options.backend} if options.backend else {})) as llm:
        prompts = [
            list(llm.tokenizer.encode(llm.render([{"role": "user", "content": question}]), add_special_tokens=False))
            for question in QUESTIONS[: options.prompts]
        ]
        engines = {f"tokenmill, {llm.info.backend} backend": _ours(llm)}
        if "llamacpp" in options.peers:
            engines["llama.cpp"] = by_llamacpp(gguf, False)
        if "openvino" in options.peers:
            engines["OpenVINO"] = by_openvino(gguf)
        rows = [
            {"engine": name, **agreement(model, prompts, generate(prompts, options.new_tokens))}
            for name, generate in engines.items()
        ]
        found = {path.stem: logprobs(model, llm, path) for path in TEXTS}
    texts = [compared(name, *pair) for name, pair in found.items()]
    mine, right = (np.concatenate(side) for side in zip(*found.values(), strict=True))
    texts.append(compared("all", mine, right))
    _show(rows, texts)
    if options.json:
        record = {"date": time.strftime("%Y-%m-%d"), "model": gguf.name, "agreement": rows, "perplexity": texts}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def _ours(llm: LLM) -> Generate:
    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        found = llm.generate(prompts, max_new_tokens=new_tokens, ignore_eos=True)
        return [list(completion.token_ids) for completion in found]

    return generate


def _show(rows: list[dict[str, Any]], texts: list[dict[str, Any]]) -> None:
    head = ["engine", "tokens", "agreement with float32", "median logit gap where not", "largest"]
    _table(head, [
        [r["engine"], f"{r['tokens']:,}", f"{r['agreement']:.4f}", f"{r['gap_median']:.3f}", f"{r['gap_largest']:.3f}"]
        for r in rows
    ])  # fmt: skip
    head = ["text", "tokens", "perplexity", "float32", "difference", "RMS of log-probabilities' difference"]
    _table(head, [
        [t["text"], f"{t['tokens']:,}", f"{t['perplexity']:.4f}", f"{t['reference']:.4f}",
         f"{t['difference'] * 100:+.2f} % ± {t['error'] * 100:.2f}", f"{t['logprob_rms']:.4f}"]
        for t in texts
    ])  # fmt: skip


def _table(head: list[str], lines: list[list[str]]) -> None:
    print("\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines)), end="\n\n")


if __name__ == "__main__":
    main()
