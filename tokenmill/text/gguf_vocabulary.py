"""The tokenizer in the metadata of a GGUF file, as a tokenizer of the `tokenizers` library.

"gpt2": byte-level BPE with merges; `tokenizer.ggml.pre` names the way in which text is cut into words before. "llama":
SentencePiece with scores; "gemma4": the same with merges. "t5": SentencePiece's unigrams, with its normalization of
texts. Where files are silent, the defaults are llama.cpp's, whose format this is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models

from tokenmill.errors import ModelError, Unsupported
from tokenmill.text import cuts, folder, sentencepiece
from tokenmill.text.chat_template import ChatTemplate
from tokenmill.text.library import reading
from tokenmill.text.sentencepiece import Kind
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.weights.gguf import Gguf

_WHOLE_WORDS_FIRST = frozenset("llama-bpe llama3 llama-v3 tekken falcon3 falcon-h1 pixtral midm-2.0 lfm2".split())
"""Pre-tokenizers with which a word that is a token stays one, whatever its merges. BOS is added unless the file forbids
it."""

_MODELS = ("gpt2", "llama", "gemma4", "t5")

_ENCODED = ("t5",)
"""Architectures of an encoder and decoder"""

_ENDS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<EOT>",
    "<｜end▁of▁sentence｜>",
)
"""Control tokens that end an answer even where a file does not name them, as llama.cpp has it."""


def load(path: Path, config_path: str = "") -> Tokenizer:
    """Read the vocabulary of a GGUF file. `config_path`: a tokenizer_config.json whose template is preferred, or ""."""
    metadata = Gguf(path).metadata
    data = _Metadata(metadata, path)
    kind = data.take("model", str)
    if kind not in _MODELS:
        raise Unsupported("GGUF tokenizer", kind, _MODELS)
    with reading(path):
        inner = _byte_level(data) if kind == "gpt2" else sentencepiece.build(_sentencepiece(data, kind))
    bos, eos = data.token("bos_token_id"), data.token("eos_token_id")
    begins = data.take("add_bos_token", bool, kind in ("llama", "gemma4") or data.pre in _WHOLE_WORDS_FIRST)
    ends = data.take("add_eos_token", bool, kind == "t5")
    if (begins and bos) or (ends and eos):
        folder.set_post_processor(inner, bos if begins else None, eos if ends else None)
    named = {name: data.token(f"{name}_id") for name in ("bos_token", "eos_token")}
    named |= {"unk_token": data.token("unknown_token_id"), "pad_token": data.token("padding_token_id")}
    special = {name: text for name, text in named.items() if text is not None}
    own = folder.tokenizer_config(path.parent, config_path).get("chat_template") if config_path else None
    templates = {"default": own} if isinstance(own, str) else data.templates()
    return Tokenizer(
        inner,
        bos_token=bos,
        eos_token=eos,
        eos_ids=_eos_ids(data),
        chat_template=ChatTemplate(templates, bos, eos, special) if templates else None,
        answer_start=_answer_start(metadata, path),
    )


def _answer_start(metadata: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    """Return the token that begins an answer of an encoder and decoder; () for another model."""
    architecture = metadata.get("general.architecture")
    if architecture not in _ENCODED:
        return ()
    found = metadata.get(f"{architecture}.decoder_start_token_id")
    if not isinstance(found, int) or found < 0:
        raise ModelError(f"{path} lacks the key '{architecture}.decoder_start_token_id', the first token of an answer.")
    return (found,)


class _Metadata:
    """The keys below tokenizer.ggml, checked."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        self._all, self._path = metadata, path
        self.tokens: list[str] = self._list("tokens", str)
        self.kinds: list[int] = self._list("token_type", int, len(self.tokens)) or [Kind.NORMAL] * len(self.tokens)
        self.pre: str = self.take("pre", str, "default")
        if not self.tokens:
            raise ModelError(f"{path} has no vocabulary: the key 'tokenizer.ggml.tokens' is missing.")

    def take(self, key: str, kind: type, default: Any = None) -> Any:
        """Return one value; the default if there is none. Raises ModelError for another type."""
        value = self._all.get(f"tokenizer.ggml.{key}", default)
        if value is None:
            raise ModelError(f"{self._path} lacks the key 'tokenizer.ggml.{key}'.")
        if not isinstance(value, kind):
            raise ModelError(f"{self._path}: 'tokenizer.ggml.{key}' is {value!r}, not of type {kind.__name__}.")
        return value

    def _list(self, key: str, kind: type, count: int | None = None) -> list[Any]:
        value = self._all.get(f"tokenizer.ggml.{key}")
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(each, kind) for each in value):
            raise ModelError(f"{self._path}: 'tokenizer.ggml.{key}' is not a list of {kind.__name__}.")
        if count is not None and len(value) != count:
            raise ModelError(f"{self._path}: 'tokenizer.ggml.{key}' has {len(value)} entries for {count} tokens.")
        return value

    def raw(self, key: str) -> bytes:
        """Return a list of bytes, signed or not; none if the file has none."""
        return bytes(number & 255 for number in self._list(key, int))

    def scores(self) -> list[float]:
        """Return a score for each token; zeros if the file has none."""
        return self._list("scores", float, len(self.tokens)) or [0.0] * len(self.tokens)

    def merges(self) -> list[tuple[str, str]]:
        """Return pairs of tokens, in the order in which they are merged."""
        pairs: list[tuple[str, str]] = []
        for line in self._list("merges", str):
            left, space, right = line.partition(" ")
            if not space:
                raise ModelError(f"{self._path}: the merge {line!r} is not two tokens with a space between.")
            pairs.append((left, right))
        return pairs

    def id(self, key: str) -> int | None:
        """Return a token's id, or None if the file names none."""
        value = self._all.get(f"tokenizer.ggml.{key}")
        return value if isinstance(value, int) and 0 <= value < len(self.tokens) else None

    def token(self, key: str) -> str | None:
        """Return the text of the token whose id the key names."""
        token_id = self.id(key)
        return None if token_id is None else self.tokens[token_id]

    def templates(self) -> dict[str, str]:
        """Return the chat templates by name."""
        names = self._all.get("tokenizer.chat_templates") or []
        keys = {str(name): f"tokenizer.chat_template.{name}" for name in names}
        found = {name: self._all.get(key) for name, key in {**keys, "default": "tokenizer.chat_template"}.items()}
        return {name: text for name, text in found.items() if isinstance(text, str)}


def _byte_level(data: _Metadata) -> tokenizers.Tokenizer:
    if data.pre not in cuts.BY_NAME:
        raise Unsupported("GGUF pre-tokenizer", data.pre, cuts.BY_NAME)
    ids = {token: i for i, token in enumerate(data.tokens)}
    model = models.BPE(ids, data.merges(), ignore_merges=data.pre in _WHOLE_WORDS_FIRST)
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = cuts.splitter(cuts.BY_NAME[data.pre])
    inner.decoder = decoders.ByteLevel()
    sentencepiece.add_tokens(inner, data.tokens, data.kinds)
    return inner


def _sentencepiece(data: _Metadata, kind: str) -> sentencepiece.Vocabulary:
    return sentencepiece.Vocabulary(
        data.tokens,
        data.scores(),
        data.kinds,
        byte_fallback=any(kind == Kind.BYTE for kind in data.kinds),
        add_dummy_prefix=data.take("add_space_prefix", bool, kind != "gemma4"),
        unigram=kind == "t5",
        merges=data.merges() if kind == "gemma4" else [],
        remove_extra_whitespaces=data.take("remove_extra_whitespaces", bool, False),
        charsmap=data.raw("precompiled_charsmap"),
    )


def _eos_ids(data: _Metadata) -> tuple[int, ...]:
    named = [data.id(key) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
    control = {token: i for i, token in enumerate(data.tokens) if data.kinds[i] == Kind.CONTROL}
    return tuple(dict.fromkeys(i for i in [*named, *(control.get(text) for text in _ENDS)] if i is not None))
