"""Table of docs/models.md, from the families that the tests compare with transformers.

Run from the repository: PYTHONPATH=.:tests python tests/support_model_table.py > docs/models.md
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import support_encoded
from support_models import FAMILIES, SIZES
from support_multimodal import MULTIMODAL
from support_states import STATES

from tokenmill.backends.cpu import prepare as cpu
from tokenmill.backends.cuda import prepare as cuda
from tokenmill.errors import StartError
from tokenmill.models._aliases import ALIASES
from tokenmill.models.base import program_of
from tokenmill.program.cost import cache_layout, state_layout
from tokenmill.program.shard import shard
from tokenmill.program.value import Program
from tokenmill.weights.gguf_architectures import ARCHITECTURES

NOT_HERE = """
    apertus1p5_text aria_text axk1 axk2 bailing_hybrid bart beam bert bert-generation big_bird bigbird_pegasus
    biogpt bitnet blenderbot blenderbot-small blt camembert cohere2_moe cohere_compass_text cpmant ctrl
    data2vec-text deepseek_v32 deepseek_v4 diffllama doge dory dots3_note dots3_note_text electra emu3 ernie flint
    fuyu gemma4_assistant gemma4_unified_assistant git glm_moe_dsa gpt_neox_japanese hrm_text hy_v3 hy_v4
    inkling2_loop_text inkling2_text inkling_text jetmoe kolibri1 laguna lara_mini lfm3 longcat_flash marian mbart
    megatron-bert mellum mimo_v2_flash minimax minimax_m3_vl_text mllama modernbert-decoder moshi
    moss_transcribe_diarize musicgen musicgen_melody mvp openai-gpt pegasus phi4_multimodal plbart prophetnet
    qwen4_exp qwen4_exp_text reformer rembert roberta roberta-prelayernorm roc_bert roformer rwkv trocr whisper
    xglm xlm xlm-roberta xlm-roberta-xl xlnet xlstm xmod zamba zamba2 zaya
""".split()
"""Causal language models of transformers 5.24 that no file builds."""

WHOLE = ("gemma3", "gemma3n", "gemma4", "gemma4_unified", "got_ocr2", "llama4", "qwen3_5", "qwen3_5_moe")
"""Causal language models of transformers whose language parts have model types of their own, which files build."""

HEAD = """# Models

This page is made from the list of families that the tests compare with transformers: see
`tests/support_model_table.py`.

The *model type* is `model_type` in config.json, or that of `text_config`: of a multimodal model the language part is
served. *Also*: model types that compute the same. *GGUF*: `general.architecture` of GGUF files that are read as this
type. "yes" in the columns *CPU* and *NVIDIA* means that the fast backend for that hardware has kernels for the
architecture. Else `backends/torch` serves it on the same hardware, more slowly, for the reason in the cell; the log and
`tokenmill doctor` report this for a given model, too. *Ranks*: `--num-shard` above 1, of any number ("in part": every
rank computes all of the layers that keep a state, and holds their weights). *Window*: some or all layers can have a
sliding window. *State*: layers that keep a state of fixed size for each sequence instead of keys and values.

T5, mT5 and UMT5 are an encoder and a decoder: the prompt is the encoder's input, and `decoder_start_token_id` begins an
answer. Their prefix cache is off, prompts have no log-probabilities, and a chat needs a template.

## Other models

A model type that is not in the table is served by the library transformers, if it defines a causal language model of
that type (`pip install 'tokenmill[transformers]'`). The layers are transformers', but attention, cache, scheduling and
sampling are tokenmill's, so continuous batching, chunked prompts, the prefix cache, constrained output and
log-probabilities work as with other models. It is slower, and takes one device: no `--num-shard`, no `--quantize`, no
quantized weights, no GGUF. The log, `/info` (`backend`) and `tokenmill doctor` report it. `--backend transformers`
serves a model type of the table in this way, for a comparison.

A model is refused, with the reason, if its attention cannot be replaced, if its layers keep a state beside keys and
values, if its mask is neither causal nor a sliding window, or if it is an encoder and a decoder. At the start, its
logits with tokenmill's attention are compared with those of transformers alone; if they differ, it is refused.

If transformers does not define the type either, the model's repository may bring Python code that does (`auto_map` in
config.json). That code is run with `--trust-remote-code` only, under the same conditions: its attention must be called
through transformers' interface for attention functions.

Causal language models of transformers 5.24 that are not in the table: OTHERS.

## Model types

| Model type | Also | GGUF | CPU | NVIDIA | Ranks | Window | State |
|---|---|---|---|---|---|---|---|
"""


def programs() -> dict[str, list[Program]]:
    """Return the programs of all families, by model type."""
    from transformers import AutoConfig

    cases = [(kind, SIZES | own) for kind, own in FAMILIES.values()] + list(STATES.values())
    cases += [(kind, support_encoded.SIZES | own) for kind, own in support_encoded.FAMILIES.values()]
    texts = [dict(text) for text, _ in MULTIMODAL.values() if "model_type" in text]
    cases += [(text.pop("model_type"), text) for text in texts]
    found: dict[str, list[Program]] = {}
    for kind, fields in (case for case in cases if case[0] not in ALIASES):
        config: dict[str, Any] = AutoConfig.for_model(kind, **deepcopy(fields)).to_dict()
        found.setdefault(kind, []).append(program_of(config))
    return found


def aliases_of(kind: str) -> str:
    """Return the model types that the file of another one builds."""
    return ", ".join(f"`{name}`" for name, alias in ALIASES.items() if alias.of == kind)


def _best(reasons: list[str]) -> str:
    return "yes" if "" in reasons else reasons[0]


def _ranks(program: Program) -> str:
    try:
        of_rank = shard(program, 2)
    except StartError:
        return "no"
    return "in part" if state_layout(of_rank) and state_layout(of_rank) == state_layout(program) else ""


def row(kind: str, variants: list[Program]) -> str:
    """Return the line of a model type. A property is stated if any of its variants has it."""
    window = any(layer.window for p in variants for layer in cache_layout(p).values())
    state = any(state_layout(p) for p in variants)
    cells = (
        aliases_of(kind), ggufs_of(kind),
        _best([cpu.refusal(p, 16) for p in variants]), _best([cuda.refusal(p, "bfloat16") for p in variants]),
        _best([_ranks(p) for p in variants]), "yes" if window else "", "yes" if state else "",
    )  # fmt: skip
    return f"| `{kind}` | {' | '.join(cells)} |"


def ggufs_of(kind: str) -> str:
    """Return the architectures of GGUF files of a model type."""
    names = {name.partition(" with ")[0] for name, found in ARCHITECTURES.items() if found.model_type == kind}
    return ", ".join(f"`{name}`" for name in sorted(names))


def page() -> str:
    """Return the page."""
    head = HEAD.replace("OTHERS", ", ".join(f"`{name}`" for name in NOT_HERE))
    return head + "\n".join(row(kind, variants) for kind, variants in sorted(programs().items())) + "\n"


if __name__ == "__main__":
    print(page(), end="")
