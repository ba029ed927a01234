"""Generate a byte-level BPE tokenizer with the vocabulary size of a model and invented words.

Ids are the 256 bytes, then words of one to four letters with a space before them, then special tokens. Nearly every id
therefore has its own text, and the spaces of a text count its tokens.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

MARK = " "
"""Text that occurs once in every invented word"""
_SPACE = "Ġ"  # as byte-level BPE writes it
_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path, config: dict[str, Any]) -> None:
    """Write tokenizer.json and tokenizer_config.json. The vocabulary must have room for 256 bytes and some words."""
    size, bos, eos = config["vocab_size"], config["bos_token_id"], config["eos_token_id"]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *_words(bos - 256)]
    merges = [(word[:-1], word[-1]) for word in words[256:]]
    inner = tokenizers.Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    names = {bos: "<|begin_of_text|>", eos: "<|end_of_text|>"}
    special = [names.get(i, f"<|reserved_{i}|>") for i in range(bos, size)]
    inner.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in special])
    assert inner.get_vocab_size(True) == size, (inner.get_vocab_size(True), size)
    inner.save(str(folder / "tokenizer.json"), pretty=False)
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": names[bos], "eos_token": names[eos],
        "model_max_length": config["max_position_embeddings"], "clean_up_tokenization_spaces": False,
        "chat_template": _TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def _words(count: int) -> list[str]:
    """Return words, each after all of its prefixes."""
    found: list[str] = []
    for length in range(1, 5):
        for letters in product(ascii_lowercase, repeat=length):
            if len(found) == count:
                return found
            found.append(_SPACE + "".join(letters))
    raise ValueError(f"there are {len(found)} words, not {count}")
