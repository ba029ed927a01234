"""The tokenizer of a model folder: tokenizer.json, or older vocabulary files, and the files beside them.

tokenizer_config.json, special_tokens_map.json, added_tokens.json, generation_config.json and config.json are all
optional, and are applied as `transformers` applies them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, pre_tokenizers, processors

from tokenmill.errors import ModelError
from tokenmill.text import bytelevel, sentencepiece, wordpiece
from tokenmill.text.chat_template import ChatTemplate
from tokenmill.text.files import added_token, content_of, read_json, read_text
from tokenmill.text.library import reading
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.weights.checkpoint import language_config

log = logging.getLogger(__name__)

_TEKKEN = "tekken.json"
_SENTENCEPIECE = ("tokenizer.model", "tiktoken.model", "spiece.model", "sentencepiece.bpe.model")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_NO_LIMIT = 10**9  # transformers writes 10^30 for "none"
_WRITTEN_HERE = {
    "Llama": (True, False),
    "CodeLlama": (True, False),
    "Gemma": (True, False),
    "Cohere": (True, False),
    "GPTNeoX": (False, False),
}
"""Classes of `transformers` that heed add_bos_token and add_eos_token, and what these default to."""


def load(folder: Path, config_path: str = "") -> Tokenizer:
    """Read a folder. `config_path`: a file to use as tokenizer_config.json, or "". Raises ModelError with file and
    remedy."""
    config = tokenizer_config(folder, config_path)
    inner = _inner(folder, config)
    special = _special_tokens(folder, config)
    _add_tokens(inner, folder, config, special)
    bos, eos = special.get("bos_token"), special.get("eos_token")
    _write_post_processor(folder, inner, config, bos, eos)
    templates = chat_templates(folder, config, bool(config_path))
    longest = config.get("model_max_length")
    return Tokenizer(
        inner,
        bos_token=bos,
        eos_token=eos,
        eos_ids=_eos_ids(folder, inner, eos),
        max_length=int(longest) if isinstance(longest, int | float) and 0 < longest < _NO_LIMIT else None,
        chat_template=ChatTemplate(templates, bos, eos, _variables(config, special)) if templates else None,
        answer_start=_answer_start(folder),
    )


def _answer_start(folder: Path) -> tuple[int, ...]:
    """Return the token that begins an answer of an encoder and decoder; () for another model.

    Raises ModelError if nothing names it.
    """
    own = language_config(read_json(folder / "config.json"))
    if own.get("is_encoder_decoder") is not True:
        return ()
    for config in (read_json(folder / "generation_config.json"), own):
        found = config.get("decoder_start_token_id")
        if isinstance(found, int) and found >= 0:
            return (found,)
    raise ModelError(
        f"{folder}: config.json is of an encoder and a decoder, but neither it nor generation_config.json names the "
        'first token of an answer. Add "decoder_start_token_id" to it (T5: 0).'
    )


def tokenizer_config(folder: Path, config_path: str) -> dict[str, Any]:
    """Return tokenizer_config.json, or the file that replaces it (JSON, or a .jinja template alone)."""
    if not config_path:
        return read_json(folder / "tokenizer_config.json")
    path = Path(config_path)
    if not path.is_file():
        raise ModelError(f"--tokenizer-config-path: {path} does not exist.")
    return {"chat_template": read_text(path)} if path.suffix == ".jinja" else read_json(path)


def chat_templates(folder: Path, config: Mapping[str, Any], preferred: bool) -> dict[str, str]:
    """Return the templates by name, from the first of the usual places that has any.

    `preferred`: the user named the configuration, so its template comes first. Raises ModelError if a template is not
    text.
    """
    found = (
        (preferred and _templates_in(config))
        or _template_files(folder)
        or _templates_in(read_json(folder / "chat_template.json"))
        or _templates_in(config)
        or _templates_in(read_json(folder / "processor_config.json"))
    )
    for name, template in found.items():
        if not isinstance(template, str):
            raise ModelError(f"{folder}: the chat template {name!r} is not text but {type(template).__name__}.")
    return found


def _inner(folder: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if path.is_file():
        with reading(path):
            inner = tokenizers.Tokenizer.from_file(str(path))
        _set_prefix_space(inner, config)
        return inner
    name = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if (folder / _TEKKEN).is_file():
        return bytelevel.load_tekken(folder / _TEKKEN)
    for path in [folder / file for file in _SENTENCEPIECE] + sorted(folder.glob("*.tiktoken")):
        if path.is_file() and bytelevel.is_tiktoken(path):
            return bytelevel.load_tiktoken(path, config, name)
        if path.is_file() and path.suffix == ".model":
            return sentencepiece.load(path, legacy=config.get("legacy", True) is not False)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return bytelevel.load_merges(folder / "vocab.json", folder / "merges.txt", config, name)
    if (folder / "vocab.txt").is_file():
        return wordpiece.load(folder / "vocab.txt", config)
    others = [file for file in ("vocab.json", "merges.txt") if (folder / file).is_file()]
    others += sorted(path.name for path in folder.glob("*.tiktoken"))
    what = f"Its {others[0]} is not enough" if others else "It has no other vocabulary that is known here either"
    raise ModelError(
        f"{folder} has no tokenizer.json. {what}: convert it with "
        "`transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)`, or download the file."
    )


def _set_prefix_space(inner: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Set whether a text's first word is read as if a space preceded it: as in the configuration, like `transformers`,
    and without one never."""
    prefixed = bool(config.get("add_prefix_space", False))
    cutter = inner.pre_tokenizer
    if config and isinstance(cutter, pre_tokenizers.ByteLevel) and cutter.add_prefix_space != prefixed:
        cutter.add_prefix_space = prefixed
        inner.pre_tokenizer = cutter


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return bos_token and so on that are set, from the configuration or special_tokens_map.json."""
    both = {**read_json(folder / "special_tokens_map.json"), **{k: v for k, v in config.items() if v is not None}}
    if (folder / _TEKKEN).is_file() and not (folder / "tokenizer.json").is_file():
        both = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **both}
    texts = ((name, content_of(both.get(name))) for name in _SPECIAL)
    return {name: text for name, text in texts if text is not None}


def _variables(config: Mapping[str, Any], special: Mapping[str, str]) -> dict[str, Any]:
    """Return the special tokens as variables of templates. A model may have more of them, such as "image_token"."""
    extra = config.get("extra_special_tokens")
    named = {name: content_of(token) for name, token in extra.items()} if isinstance(extra, dict) else {}
    more = [text for token in config.get("additional_special_tokens") or () if (text := content_of(token))]
    listed = {"additional_special_tokens": more} if more else {}
    return {name: text for name, text in named.items() if text is not None} | listed | dict(special)


def _add_tokens(
    inner: tokenizers.Tokenizer, folder: Path, config: Mapping[str, Any], special: Mapping[str, str]
) -> None:
    """Add the tokens that only the configuration has, or that are special only there."""
    known = {token.content: token for token in inner.get_added_tokens_decoder().values()}
    listed = {int(token_id): token for token_id, token in (config.get("added_tokens_decoder") or {}).items()}
    listed |= {
        token_id: text for text, token_id in read_json(folder / "added_tokens.json").items() if token_id not in listed
    }
    tokens = [added_token(token) for _, token in sorted(listed.items())]
    more = [content_of(token) for token in config.get("additional_special_tokens") or ()]
    tokens += [AddedToken(text, special=True, normalized=False) for text in [*special.values(), *more] if text]
    for token in tokens:
        before = known.get(token.content)
        if before is None or (token.special and not before.special):
            (inner.add_special_tokens if token.special else inner.add_tokens)([token])
            known[token.content] = token
    for token_id, token in listed.items():
        text = added_token(token).content
        if (got := inner.token_to_id(text)) != token_id:
            log.warning("The token %r should have the id %d but has %s.", text, token_id, got)


def _write_post_processor(
    folder: Path, inner: tokenizers.Tokenizer, config: Mapping[str, Any], bos: str | None, eos: str | None
) -> None:
    """Add BOS and EOS where there is no tokenizer.json, or the tokenizer's class overrides it."""
    name = str(config.get("tokenizer_class", "")).removesuffix("Fast").removesuffix("Tokenizer")
    found = _WRITTEN_HERE.get(name)
    if found is None and (folder / "tokenizer.json").is_file():
        return
    begins, ends = found or ((folder / _TEKKEN).is_file(), False)
    begin = bos if config.get("add_bos_token", begins) else None
    end = eos if config.get("add_eos_token", ends) else None
    if found or begin or end:
        set_post_processor(inner, begin, end)


def set_post_processor(inner: tokenizers.Tokenizer, begin: str | None, end: str | None) -> None:
    """Make encoding put these tokens around a text; none if both are None."""
    around = [token for token in (begin, end) if token is not None and inner.token_to_id(token) is not None]
    single = [token for token in (begin, "$A", end) if token == "$A" or token in around]
    inner.post_processor = processors.TemplateProcessing(
        single=[f"{token}:0" for token in single],
        pair=[f"{token}:0" for token in single] + [f"{'$B' if token == '$A' else token}:1" for token in single],
        special_tokens=[(token, inner.token_to_id(token)) for token in dict.fromkeys(around)],
    )


def _eos_ids(folder: Path, inner: tokenizers.Tokenizer, eos: str | None) -> tuple[int, ...]:
    """Return all ids that end an answer: generation_config.json's, else config.json's; and the tokenizer's."""
    config = read_json(folder / "config.json")
    text = config.get("text_config")  # may lack the model type that makes it the language part
    parts = (read_json(folder / "generation_config.json"), config, text, language_config(config))
    candidates = [part.get("eos_token_id") for part in parts if isinstance(part, dict)]
    first: Any = next((ids for ids in candidates if ids is not None), [])
    ids = list(first) if isinstance(first, list) else [first]
    own = inner.token_to_id(eos) if eos is not None else None
    return tuple(dict.fromkeys(i for i in [*ids, own] if isinstance(i, int)))


def _template_files(folder: Path) -> dict[str, Any]:
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    return {name: read_text(path) for name, path in files.items()}


def _templates_in(config: Mapping[str, Any]) -> dict[str, Any]:
    found = config.get("chat_template")
    if isinstance(found, list):
        return {str(each.get("name")): each.get("template") for each in found if isinstance(each, dict)}
    if isinstance(found, dict):
        return found
    return {} if found is None else {"default": found}
