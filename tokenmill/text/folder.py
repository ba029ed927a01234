"""The tokenizer of a model folder: tokenizer.json (or tokenizer.model) and the files around it.

tokenizer_config.json, special_tokens_map.json, added_tokens.json, generation_config.json and config.json are all
optional; what they say is applied as `transformers` applies it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, processors

from tokenmill.errors import ModelError
from tokenmill.text import sentencepiece
from tokenmill.text.chat_template import ChatTemplate
from tokenmill.text.library import reading
from tokenmill.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

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
    """Read a folder. `config_path`: a file to use for tokenizer_config.json, or "". ModelError names file and cure."""
    config = tokenizer_config(folder, config_path)
    inner = _inner(folder, config)
    special = _special_tokens(folder, config)
    _add_tokens(inner, folder, config, special)
    bos, eos = special.get("bos_token"), special.get("eos_token")
    _write_post_processor(inner, config, bos, eos)
    templates = chat_templates(folder, config, bool(config_path))
    longest = config.get("model_max_length")
    return Tokenizer(
        inner,
        bos_token=bos,
        eos_token=eos,
        eos_ids=_eos_ids(folder, inner, eos),
        max_length=int(longest) if isinstance(longest, int | float) and 0 < longest < _NO_LIMIT else None,
        chat_template=ChatTemplate(templates, bos, eos, special) if templates else None,
    )


def tokenizer_config(folder: Path, config_path: str) -> dict[str, Any]:
    """tokenizer_config.json, or the file that was given in its place (JSON, or a .jinja template alone)."""
    if not config_path:
        return read_json(folder / "tokenizer_config.json")
    path = Path(config_path)
    if not path.is_file():
        raise ModelError(f"--tokenizer-config-path: {path} does not exist.")
    return {"chat_template": _read_text(path)} if path.suffix == ".jinja" else read_json(path)


def chat_templates(folder: Path, config: Mapping[str, Any], preferred: bool) -> dict[str, str]:
    """Templates by name from the first place that has any, of those where models keep them.

    `preferred`: the configuration was named by the user, so its template comes first. ModelError for what is no text.
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; {} if there is no such file. ModelError if it is anything else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except ValueError as e:
        raise ModelError(f"{path} is not valid JSON: {e}. Download the file again.") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ModelError(f"{path} cannot be read: {e}.") from None


def _inner(folder: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if path.is_file():
        with reading(path):
            return tokenizers.Tokenizer.from_file(str(path))
    if (folder / "tokenizer.model").is_file():
        return sentencepiece.load(folder / "tokenizer.model", legacy=config.get("legacy", True) is not False)
    others = [name for name in ("tekken.json", "vocab.json", "vocab.txt", "spiece.model") if (folder / name).is_file()]
    others += sorted(path.name for path in folder.glob("*.tiktoken"))
    what = f"Its {others[0]} is of a kind that is not read here" if others else "It has no tokenizer.model either"
    raise ModelError(
        f"{folder} has no tokenizer.json. {what}: convert it with "
        "`transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)`, or download the file."
    )


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and so on, as the configuration or special_tokens_map.json says; those that are set."""
    both = {**read_json(folder / "special_tokens_map.json"), **{k: v for k, v in config.items() if v is not None}}
    texts = ((name, _content(both.get(name))) for name in _SPECIAL)
    return {name: text for name, text in texts if text is not None}


def _content(token: Any) -> str | None:
    """Tokens are written as text, or as an object with their properties."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _add_tokens(
    inner: tokenizers.Tokenizer, folder: Path, config: Mapping[str, Any], special: Mapping[str, str]
) -> None:
    """Tokens that only the configuration knows, or that only it calls special."""
    known = {token.content: token for token in inner.get_added_tokens_decoder().values()}
    listed = {int(token_id): token for token_id, token in (config.get("added_tokens_decoder") or {}).items()}
    listed |= {
        token_id: text for text, token_id in read_json(folder / "added_tokens.json").items() if token_id not in listed
    }
    wanted = [_added_token(token) for _, token in sorted(listed.items())]
    more = [_content(token) for token in config.get("additional_special_tokens") or ()]
    wanted += [AddedToken(text, special=True, normalized=False) for text in [*special.values(), *more] if text]
    for token in wanted:
        before = known.get(token.content)
        if before is None or (token.special and not before.special):
            (inner.add_special_tokens if token.special else inner.add_tokens)([token])
            known[token.content] = token
    for token_id, token in listed.items():
        got = inner.token_to_id(_content(token))
        if got != token_id:
            log.warning("The token %r should have the id %d but has %s.", _content(token), token_id, got)


def _added_token(token: Any) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=False, normalized=False)
    flags = {
        name: bool(token.get(name, False)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
    }
    return AddedToken(_content(token) or "", **flags)


def _write_post_processor(
    inner: tokenizers.Tokenizer, config: Mapping[str, Any], bos: str | None, eos: str | None
) -> None:
    """For the classes that disregard what tokenizer.json says of BOS and EOS."""
    name = str(config.get("tokenizer_class", "")).removesuffix("Fast").removesuffix("Tokenizer")
    if name not in _WRITTEN_HERE:
        return
    begins, ends = _WRITTEN_HERE[name]
    begin = bos if config.get("add_bos_token", begins) else None
    end = eos if config.get("add_eos_token", ends) else None
    set_post_processor(inner, begin, end)


def set_post_processor(inner: tokenizers.Tokenizer, begin: str | None, end: str | None) -> None:
    """Let encoding put these tokens around a text; none if both are None."""
    around = [token for token in (begin, end) if token is not None and inner.token_to_id(token) is not None]
    single = [token for token in (begin, "$A", end) if token == "$A" or token in around]
    inner.post_processor = processors.TemplateProcessing(
        single=[f"{token}:0" for token in single],
        pair=[f"{token}:0" for token in single] + [f"{'$B' if token == '$A' else token}:1" for token in single],
        special_tokens=[(token, inner.token_to_id(token)) for token in dict.fromkeys(around)],
    )


def _eos_ids(folder: Path, inner: tokenizers.Tokenizer, eos: str | None) -> tuple[int, ...]:
    """Every id that ends an answer: generation_config.json's, else config.json's; and the tokenizer's."""
    config = read_json(folder / "config.json")
    nested = config.get("text_config")
    told = (
        read_json(folder / "generation_config.json").get("eos_token_id"),
        config.get("eos_token_id"),
        nested.get("eos_token_id") if isinstance(nested, dict) else None,
    )
    first: Any = next((ids for ids in told if ids is not None), [])
    ids = list(first) if isinstance(first, list) else [first]
    own = inner.token_to_id(eos) if eos is not None else None
    return tuple(dict.fromkeys(i for i in [*ids, own] if isinstance(i, int)))


def _template_files(folder: Path) -> dict[str, Any]:
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    return {name: _read_text(path) for name, path in files.items()}


def _templates_in(config: Mapping[str, Any]) -> dict[str, Any]:
    found = config.get("chat_template")
    if isinstance(found, list):
        return {str(each.get("name")): each.get("template") for each in found if isinstance(each, dict)}
    if isinstance(found, dict):
        return found
    return {} if found is None else {"default": found}
