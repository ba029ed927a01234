"""BERT's vocab.txt: one token on each line, pieces inside of words marked by ##."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from tokenmill.errors import ModelError
from tokenmill.text.files import content_of, read_text
from tokenmill.text.library import reading

_NEEDED = ("unk_token", "cls_token", "sep_token")
_SPECIAL = {name: f"[{name[:-6].upper()}]" for name in (*_NEEDED, "pad_token", "mask_token")}


def load(path: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Read a vocabulary, with the normalization of BERT's tokenizer that the configuration sets."""
    lines = read_text(path).removesuffix("\n").split("\n")
    named = {name: content_of(config.get(name)) or default for name, default in _SPECIAL.items()}
    ids = {token.removesuffix("\r"): i for i, token in enumerate(lines)}
    missing = next((named[name] for name in _NEEDED if named[name] not in ids), None)
    if missing is not None:
        raise ModelError(f"{path} lacks the token {missing}: it is not a vocabulary of BERT's kind.")
    with reading(path):
        inner = tokenizers.Tokenizer(models.WordPiece(ids, unk_token=named["unk_token"]))
    inner.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
        strip_accents=config.get("strip_accents"),
        lowercase=bool(config.get("do_lower_case", True)),
    )
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    first, last = named["cls_token"], named["sep_token"]
    inner.post_processor = processors.TemplateProcessing(
        single=f"{first}:0 $A:0 {last}:0",
        pair=f"{first}:0 $A:0 {last}:0 $B:1 {last}:1",
        special_tokens=[(first, ids[first]), (last, ids[last])],
    )
    inner.add_special_tokens([token for token in dict.fromkeys(named.values()) if token in ids])
    return inner
