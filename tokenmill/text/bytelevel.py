"""Byte-level BPE from files of models without a tokenizer.json.

Three forms: GPT-2's vocab.json with merges.txt; tiktoken's list of tokens in base64, each with its rank; Mistral's
tekken.json, which has ranks, the expression that cuts texts, and the special tokens. Ranks become merges as in
`transformers`: a token can be made of any two others, the lower ranks first.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from tokenmill.errors import ModelError
from tokenmill.text import cuts
from tokenmill.text.files import added_token, read_json, read_text
from tokenmill.text.library import reading
from tokenmill.text.pieces import byte_characters
from tokenmill.weights.source import refuse_pointer

_NFC = frozenset({"Qwen2Tokenizer", "QWenTokenizer"})
_TEKKEN_SPECIAL = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] "
    "[IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
).split()
"""The first ids of a tekken.json that does not list its special tokens."""
_QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
_OPENAI_SPECIAL = {
    "cl100k_base": {
        100257: "<|endoftext|>", 100258: "<|fim_prefix|>", 100259: "<|fim_middle|>", 100260: "<|fim_suffix|>",
        100276: "<|endofprompt|>",
    },
    "o200k_base": {199999: "<|endoftext|>", 200018: "<|endofprompt|>"},
}  # fmt: skip


def is_tiktoken(path: Path) -> bool:
    """Return True if a file begins as tiktoken's do: a token in base64, a space, a number. `tokenizer.model` can be
    either.

    Raises ModelError for a Git LFS pointer.
    """
    refuse_pointer(path)
    with path.open("rb") as file:
        first = file.readline(4096).split()
    if len(first) != 2 or not first[1].isdigit():
        return False
    try:
        return bool(base64.b64decode(first[0], validate=True))
    except (binascii.Error, ValueError):
        return False


def load_merges(vocabulary: Path, merges: Path, config: Mapping[str, Any], class_name: str) -> tokenizers.Tokenizer:
    """Read vocab.json and merges.txt, with the way in which their class cuts words: GPT-2's unless it is Qwen's."""
    ids = read_json(vocabulary)
    if not all(isinstance(token_id, int) for token_id in ids.values()):
        raise ModelError(f"{vocabulary} must map tokens to their ids. Download the file again.")
    lines = read_text(merges).split("\n")
    lines = lines[1:] if lines[0].startswith("#version") else lines
    pairs = [tuple(line.split(" ")) for line in lines if line.strip()]
    wrong = next((pair for pair in pairs if len(pair) != 2), None)
    if wrong is not None:
        raise ModelError(f"{merges}: the merge {' '.join(wrong)!r} is not two tokens with a space between.")
    qwen = class_name in _NFC
    with reading(merges):
        inner = tokenizers.Tokenizer(models.BPE(ids, [(left, right) for left, right in pairs]))
    if qwen:
        return _finished(inner, cuts.QWEN2, nfc=True)
    _finished(inner, cuts.GPT2)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(bool(config.get("add_prefix_space", False)))  # includes the cutting
    return inner


def load_tiktoken(path: Path, config: Mapping[str, Any], class_name: str) -> tokenizers.Tokenizer:
    """Read a list of ranks. Special tokens: those of the configuration, else the known ones of the file's name or
    class."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line:
            continue
        token, _, rank = line.partition(" ")
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (binascii.Error, ValueError):
            message = f"{path}: line {number} is not a token in base64 and its rank. Download the file again."
            raise ModelError(message) from None
    with reading(path):
        inner = tokenizers.Tokenizer(_model(ranks))
        _add_tokens(inner, _tokens_of(path, config, class_name, len(ranks)))
    return _finished(inner, _expression(path, class_name), nfc=class_name in _NFC)


def load_tekken(path: Path) -> tokenizers.Tokenizer:
    """Read a tekken.json. Its special tokens come first, then as many ordinary ones as its configuration states."""
    found = read_json(path)
    config, listed = found.get("config"), found.get("vocab")
    if not isinstance(config, dict) or not isinstance(listed, list):
        raise ModelError(f"{path} lacks its 'config' or 'vocab'. Download the file again.")
    try:
        reserved = int(config.get("default_num_special_tokens", 1000))
        size = int(config.get("default_vocab_size", reserved + len(listed)))
        special = {int(token["rank"]): str(token["token_str"]) for token in found.get("special_tokens") or ()}
        ordinary = listed[: size - reserved]
        ranks = {base64.b64decode(token["token_bytes"]): int(token["rank"]) + reserved for token in ordinary}
        expression = str(config["pattern"])
    except (KeyError, TypeError, ValueError) as e:
        why = f"an entry lacks {e}" if isinstance(e, KeyError) else "an entry is none of a token"
        raise ModelError(f"{path} is no tekken file: {why}. Download the file again.") from None
    special = special or dict(enumerate(_TEKKEN_SPECIAL))
    named = {i: special.get(i, f"<SPECIAL_{i}>") for i in range(reserved)}
    with reading(path):
        inner = tokenizers.Tokenizer(_model(ranks, named))
        _add_tokens(inner, {i: _special(text) for i, text in named.items()})
        return _finished(inner, expression)


def _finished(inner: tokenizers.Tokenizer, expression: str, *, nfc: bool = False) -> tokenizers.Tokenizer:
    if nfc:
        inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = cuts.splitter((expression,))
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.ByteLevel(trim_offsets=False)
    return inner


def _model(ranks: Mapping[bytes, int], more: Mapping[int, str] | None = None) -> models.BPE:
    """Return a BPE model of ranks. `more`: further tokens, which no merge makes. A word that is a token stays whole."""
    character_of = {byte: character for character, byte in byte_characters().items()}
    spelled = {token: "".join([character_of[byte] for byte in token]) for token in ranks}
    merges: list[tuple[int, int, int, str, str]] = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                merges.append((rank, ranks[left], ranks[right], spelled[left], spelled[right]))
    merges.sort()
    ids = {spelled[token]: rank for token, rank in ranks.items()} | {text: i for i, text in (more or {}).items()}
    return models.BPE(ids, [(left, right) for _, _, _, left, right in merges], ignore_merges=True)


def _add_tokens(inner: tokenizers.Tokenizer, wanted: Mapping[int, AddedToken]) -> None:
    """Add tokens with ids of their own. The library counts ids up, so gaps between them are filled."""
    ids = sorted({*wanted, *range(inner.get_vocab_size(True), max(wanted, default=0))})
    tokens = [wanted.get(i) or _special(f"<|unused_{i}|>") for i in ids]
    for special, run in groupby(tokens, lambda token: bool(token.special)):
        (inner.add_special_tokens if special else inner.add_tokens)(list(run))


def _special(text: str) -> AddedToken:
    return AddedToken(text, special=True, normalized=False)


def _tokens_of(path: Path, config: Mapping[str, Any], class_name: str, following: int) -> dict[int, AddedToken]:
    """Return the tokens besides those with ranks. `following`: the first id behind these."""
    listed = config.get("added_tokens_decoder")
    if listed:
        return {int(i): added_token(token) for i, token in listed.items()}
    if class_name == "QWenTokenizer":
        return {following + i: _special(token) for i, token in enumerate(_QWEN_SPECIAL)}
    return {i: _special(token) for i, token in _OPENAI_SPECIAL.get(path.stem, {}).items()}


def _expression(path: Path, class_name: str) -> str:
    """Return the expression that cuts texts. tiktoken keeps it in code, so it is chosen by class or file name."""
    if class_name == "QWenTokenizer":
        return cuts.QWEN2
    if class_name == "TikTokenTokenizer":
        return cuts.KIMI
    return cuts.O200K if path.stem.startswith("o200k") else cuts.LLAMA3
