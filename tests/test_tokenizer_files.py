"""Vocabularies without tokenizer.json: merges, tiktoken's ranks, tekken.json, vocab.txt."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from support_text import recorded

from tokenmill.errors import ModelError
from tokenmill.text.cuts import TEKKEN
from tokenmill.text.load import load_tokenizer
from tokenmill.text.pieces import byte_characters
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.weights.source import ModelSource

LLAMACPP = recorded("llamacpp.json")
TIKTOKEN = recorded("tiktoken.json")  # what tiktoken 0.14 makes of the tokens below by each expression
BYTE_OF = byte_characters()
TOKENS = [bytes(BYTE_OF[character] for character in token) for token in LLAMACPP["tokens"][3:]]


def load(folder: Path, **files: Any) -> Tokenizer:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return load_tokenizer(ModelSource(str(folder), str(folder), "safetensors"))


def write_ranks(path: Path) -> None:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(TOKENS)))


@pytest.mark.parametrize(
    ("file", "class_name", "name"),
    [
        ("cl100k_base.tiktoken", None, "cl100k_base"),
        ("o200k_base.tiktoken", None, "o200k_base"),
        ("tokenizer.model", "ChatGLM4Tokenizer", "cl100k_base"),
        ("tiktoken.model", "TikTokenTokenizer", "kimi"),
        ("qwen.tiktoken", "QWenTokenizer", "qwen"),
    ],
)
def test_ranks_cut_texts_as_tiktoken_does(file: str, class_name: str | None, name: str, tmp_path: Path) -> None:
    write_ranks(tmp_path / file)
    more = {"added_tokens_decoder": {"597": {"content": "<end>", "special": True}}} if "base" in file else {}
    tokenizer = load(tmp_path, tokenizer_config={"tokenizer_class": class_name, **more})
    for text, ids in zip(TIKTOKEN["texts"], TIKTOKEN["ids"][name], strict=True):
        if "<|" not in text:
            assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text


def test_special_tokens_of_ranks_have_the_ids_that_the_configuration_says(tmp_path: Path) -> None:
    write_ranks(tmp_path / "tiktoken.model")
    added = {
        "600": {"content": "[BOS]", "special": True},
        "602": {"content": "<tool>", "special": False},
        "606": {"content": "[EOS]", "special": True},
    }
    config = {"added_tokens_decoder": added, "bos_token": "[BOS]", "eos_token": "[EOS]", "add_bos_token": True}
    tokenizer = load(tmp_path, tokenizer_config=config)
    assert tokenizer.encode("<tool>[EOS]") == [600, 602, 606]
    assert (tokenizer.eos_ids, tokenizer.vocab_size) == ((606,), 607)
    assert tokenizer.decode([600, 602, 606]) == "<tool>"


def test_qwens_first_tokens_follow_its_ranks(tmp_path: Path) -> None:
    write_ranks(tmp_path / "qwen.tiktoken")
    tokenizer = load(tmp_path, tokenizer_config={"tokenizer_class": "QWenTokenizer"})
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|><|extra_204|>") == [597, 598, 599, 804]


def tekken(**more: Any) -> dict[str, Any]:
    config = {"pattern": TEKKEN, "default_vocab_size": len(TOKENS) + 32, "default_num_special_tokens": 32}
    surplus = [*TOKENS, b"never used"]
    listed = [
        {"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for i, t in enumerate(surplus)
    ]
    return {"config": config, "vocab": listed, **more}


def test_a_tekken_file_cuts_texts_as_tiktoken_does_behind_its_special_tokens(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, tekken=tekken())
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_ids) == ("<s>", "</s>", (2,))
    assert tokenizer.vocab_size == len(TOKENS) + 32
    for text, ids in zip(TIKTOKEN["texts"], TIKTOKEN["ids"]["tekken"], strict=True):
        assert tokenizer.encode(text) == [1, *(i + 32 for i in ids)]
        assert tokenizer.decode([1, *(i + 32 for i in ids)]) == text
    assert tokenizer.encode("[INST]<SPECIAL_31>", add_special_tokens=False) == [3, 31]


def test_a_tekken_file_may_name_its_special_tokens(tmp_path: Path) -> None:
    named = [{"rank": i, "token_str": text} for i, text in enumerate(("<unk>", "<s>", "</s>", "[THINK]"))]
    tokenizer = load(tmp_path, tekken=tekken(special_tokens=named), tokenizer_config={"add_bos_token": False})
    assert tokenizer.encode("[THINK]<SPECIAL_4></s>") == [3, 4, 2]


def vocabulary(folder: Path) -> None:
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(LLAMACPP["merges"]) + "\n")
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(LLAMACPP["tokens"])}))


@pytest.mark.parametrize(
    ("class_name", "more"),
    [
        ("GPT2Tokenizer", {}),
        ("GPT2Tokenizer", {"add_prefix_space": True}),
        ("GPT2Tokenizer", {"add_bos_token": True}),
        ("Qwen2Tokenizer", {}),
    ],
)
def test_merges_cut_texts_as_transformers_does(class_name: str, more: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    vocabulary(tmp_path)
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    tokenizer = load(tmp_path, tokenizer_config={"tokenizer_class": class_name, **names, **more})
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TIKTOKEN["texts"], "e\u0301 ﬁ", "<|im_end|>a"]:
        ids = tokenizer.encode(text)
        assert ids == theirs(text).input_ids
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert tokenizer.eos_ids == (2,)


@pytest.mark.parametrize("more", [{}, {"do_lower_case": False}, {"tokenize_chinese_chars": False}])
def test_a_list_of_word_pieces_cuts_texts_as_transformers_does(more: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    words = "[PAD] [UNK] [CLS] [SEP] [MASK] the The licen ##sed ##s work , . ' ! 中 文 ##文 n a ##ive uber Ü".split()
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = load(tmp_path, tokenizer_config={"tokenizer_class": "BertTokenizer", **more})
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("The licensed work, the licens.", "naïve 中文 [MASK]!", "Über\tÜ\n the"):
        ids = tokenizer.encode(text)
        assert ids == theirs(text).input_ids
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.tiktoken", "YQ== 0\nYg== x\n", r"a.tiktoken: line 2 is not a token in base64"),
        ("tekken.json", "{}", r"tekken.json lacks its 'config'"),
        ("tekken.json", '{"config": {}, "vocab": [{"rank": 1}]}', r"is no tekken file: an entry lacks 'token_bytes'"),
        ("tekken.json", '{"config": {"pattern": "("}, "vocab": []}', r"tekken.json cannot be read"),
        ("vocab.txt", "a\nb\n", r"vocab.txt lacks the token \[UNK\]"),
        ("vocab.json", "{}", r"no tokenizer.json. Its vocab.json is not enough"),
    ],
)
def test_a_broken_vocabulary_is_named_with_its_cure(file: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


def test_merges_that_are_no_pairs_are_refused(tmp_path: Path) -> None:
    vocabulary(tmp_path)
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(ModelError, match=r"the merge 'a b c' is not two tokens"):
        load(tmp_path)
