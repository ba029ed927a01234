from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from support_text import byte_level, recorded, sentencepiece_model, write_gguf, write_sentencepiece_gguf

from tokenmill.config import default_cache_dir
from tokenmill.errors import ModelError, StartError, Unsupported, ValidationError
from tokenmill.text import sentencepiece
from tokenmill.text.library import reading
from tokenmill.text.load import load_tokenizer
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.weights import embedded
from tokenmill.weights.source import ModelSource, local_source

LLAMACPP = recorded("llamacpp.json")
SENTENCEPIECE = recorded("sentencepiece.json")
TOKENIZER = Tokenizer(byte_level())


def source_of(folder: Path, **more: Any) -> ModelSource:
    return ModelSource(str(folder), str(folder), "safetensors", **more)


def write_folder(folder: Path, **files: Any) -> ModelSource:
    """Write a model's folder with tokenizer.json and these JSON files (or texts)."""
    byte_level().save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        if isinstance(content, str):
            (folder / f"{name}.jinja").write_text(content)
        else:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return source_of(folder)


@pytest.mark.parametrize("pre", sorted(LLAMACPP["ids"]))
def test_a_gguf_vocabulary_cuts_texts_as_llama_cpp_does(pre: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(local_source(write_gguf(tmp_path / "v.gguf", pre=pre)))
    for text, ids in zip(LLAMACPP["texts"], LLAMACPP["ids"][pre], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_embedded_models_vocabulary_cuts_texts_as_llama_cpp_does() -> None:
    path = embedded.find(default_cache_dir())
    if path is None:
        pytest.skip("the embedded model is not on this machine; `make serve` brings it")
    tokenizer = load_tokenizer(local_source(path))
    for text, ids in zip(LLAMACPP["texts"], LLAMACPP["smollm2"], strict=True):
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_ids[0]) == ("<|im_start|>", "<|im_end|>", 2)
    assert tokenizer.vocab_size == 49152
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.render([{"role": "user", "content": "Hi"}]).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("name", sorted(SENTENCEPIECE["models"]))
def test_a_sentencepiece_model_cuts_texts_as_its_library_does(name: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(name))
    tokenizer = load_tokenizer(source_of(tmp_path))
    expected = SENTENCEPIECE["models"][name]
    for text, ids, decoded in zip(SENTENCEPIECE["texts"], expected["ids"], expected["decoded"], strict=True):
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == decoded


def test_a_gguf_file_with_merges_cuts_texts_as_they_say_whatever_the_scores(tmp_path: Path) -> None:
    pieces = ["<unk>", "<bos>", "<eos>", *(f"<0x{n:02X}>" for n in range(256)), *"▁abc", "bc", "ab", "▁a", "▁abc"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * 8]
    merges = ["a b", "b c", "▁ a", "▁a bc"]  # not the order of the pieces
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, [tuple(merge.split(" ")) for merge in merges],
            unk_token="<unk>", fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    inner.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    path = write_sentencepiece_gguf(tmp_path / "m.gguf", pieces, [-1000.0] * len(pieces), kinds, merges)
    own = load_tokenizer(local_source(path))
    for text in ("abc", "a abc  b", "é abc"):
        assert own.encode(text) == [1, *inner.encode(text).ids]
        assert own.decode(own.encode(text)[1:]) == text


def test_a_gguf_file_with_scores_is_the_same_vocabulary_with_bos_in_front(tmp_path: Path) -> None:
    found = sentencepiece.parse(sentencepiece_model("bpe_identity"))
    path = write_sentencepiece_gguf(tmp_path / "v.gguf", found.pieces, found.scores, found.kinds)
    tokenizer = load_tokenizer(local_source(path))
    for text, ids in zip(SENTENCEPIECE["texts"], SENTENCEPIECE["models"]["bpe_identity"]["ids"], strict=True):
        assert tokenizer.encode(text) == [1, *ids]


def test_pieces_merge_in_the_order_of_their_scores(tmp_path: Path) -> None:
    found = sentencepiece.parse(sentencepiece_model("bpe_identity"))
    inner = sentencepiece.build(found)
    score_of = {p: s for p, s, k in zip(found.pieces, found.scores, found.kinds, strict=True) if k == 1}

    def merged(
        text: str,
    ) -> list[str]:  # SentencePiece's rule, naively: the best of all neighbours, the first of equals
        parts = list("▁" + text.replace(" ", "▁"))
        while True:
            joins = [(-score_of[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in score_of]
            if not joins:
                return parts
            _, at = min(joins)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]

    for text in ("the licensed work of others", "permission to convey  source", "environment template"):
        assert inner.encode(text, add_special_tokens=False).tokens == merged(text)


def test_bos_is_added_where_the_file_says_so(tmp_path: Path) -> None:
    plain = load_tokenizer(local_source(write_gguf(tmp_path / "a.gguf")))
    llama3 = load_tokenizer(local_source(write_gguf(tmp_path / "b.gguf", pre="llama-bpe")))
    both = load_tokenizer(local_source(write_gguf(tmp_path / "c.gguf", add_bos_token=True, add_eos_token=True)))
    off = load_tokenizer(local_source(write_gguf(tmp_path / "d.gguf", pre="llama-bpe", add_bos_token=False)))
    ids = plain.encode("a b")
    assert llama3.encode("a b") == [1, *ids]
    assert both.encode("a b") == [1, *ids, 2]
    assert off.encode("a b") == both.encode("a b", add_special_tokens=False) == ids


def test_llama_3_keeps_a_word_whole_that_its_merges_would_cut(tmp_path: Path) -> None:
    token = next(token for token in reversed(LLAMACPP["tokens"]) if token.isascii() and len(token) > 3)
    merges = [merge for merge in LLAMACPP["merges"] if merge.replace(" ", "") != token]
    cut = load_tokenizer(local_source(write_gguf(tmp_path / "a.gguf", merges=merges)))
    whole = load_tokenizer(local_source(write_gguf(tmp_path / "b.gguf", pre="llama-bpe", merges=merges)))
    assert len(cut.encode(token, add_special_tokens=False)) > 1
    assert whole.encode(token, add_special_tokens=False) == [LLAMACPP["tokens"].index(token)]


def test_merges_that_do_not_fit_the_vocabulary_are_a_model_error(tmp_path: Path) -> None:
    for merges in (["nonesuch x"], ["nospace"]):
        with pytest.raises(ModelError, match=r"(?i)merge"):
            load_tokenizer(local_source(write_gguf(tmp_path / "v.gguf", merges=merges)))


def test_an_unknown_pre_tokenizer_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"'klingon'.*llama-bpe"):
        load_tokenizer(local_source(write_gguf(tmp_path / "v.gguf", pre="klingon")))


def test_offsets_are_bytes_of_the_input_and_cover_it(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(local_source(write_gguf(tmp_path / "v.gguf", add_bos_token=True)))
    text = "Héllo 🙂 wörld<|im_end|>日本"
    bos, *rest = tokenizer.encode_with_offsets(text)
    assert bos == (1, "", 0, 0)
    assert [offset.id for offset in rest] == tokenizer.encode(text, add_special_tokens=False)
    assert all(offset.text.encode() == text.encode()[offset.start : offset.stop] for offset in rest)
    covered = {at for offset in rest for at in range(offset.start, offset.stop)}
    assert covered == set(range(len(text.encode())))


def test_encoding_in_many_threads_gives_what_one_gives() -> None:
    texts = [text * 20 for text in LLAMACPP["texts"]]
    alone = [TOKENIZER.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(TOKENIZER.encode, texts * 3)) == alone * 3


def test_text_that_utf8_cannot_hold_is_the_clients_mistake() -> None:
    with pytest.raises(ValidationError, match="tokenizer error"):
        TOKENIZER.encode("\ud800")


def test_tokens_have_bytes_and_text_of_their_own() -> None:
    ids = TOKENIZER.encode(" wörld 🙂")
    assert b"".join(TOKENIZER.token_bytes(i) for i in ids).decode() == " wörld 🙂"
    half = next(i for i in ids if TOKENIZER.pieces is not None and TOKENIZER.pieces.texts[i] is None)
    assert TOKENIZER.token_text(half) == "\ufffd"
    assert TOKENIZER.token_text(2) == "<|im_end|>"
    assert TOKENIZER.is_special(2)
    assert not TOKENIZER.is_special(5)
    assert TOKENIZER.token_bytes(10**6) == b""


def test_what_a_saved_tokenizer_truncates_and_pads_is_forgotten(tmp_path: Path) -> None:
    inner = byte_level()
    inner.enable_truncation(3)
    inner.enable_padding(length=8)
    inner.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(source_of(tmp_path)).encode("a b c d e f g")) == 7


@pytest.mark.parametrize(
    "name, adds",
    [("LlamaTokenizer", True), ("LlamaTokenizerFast", True), ("GemmaTokenizer", True),
     ("PreTrainedTokenizerFast", False), (None, False)],
)  # fmt: skip
@pytest.mark.parametrize("flags", [{}, {"add_bos_token": False}, {"add_eos_token": True}])
def test_bos_and_eos_are_added_as_the_classes_of_transformers_4_add_them(
    name: str | None, adds: bool, flags: dict[str, bool], tmp_path: Path
) -> None:
    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "tokenizer_class": name, **flags}
    source = write_folder(tmp_path, tokenizer_config=config)
    bos = [1] if adds and flags.get("add_bos_token", True) else []
    eos = [2] if adds and flags.get("add_eos_token") else []
    assert load_tokenizer(source).encode("a b") == [*bos, 67, 305, *eos]


def test_every_file_that_names_an_end_is_heard(tmp_path: Path) -> None:
    config = {"eos_token": "<|im_end|>"}
    only_tokenizer = load_tokenizer(write_folder(tmp_path, tokenizer_config=config))
    assert only_tokenizer.eos_ids == (2,)
    both = load_tokenizer(write_folder(tmp_path, tokenizer_config=config, config={"text_config": {"eos_token_id": 7}}))
    assert both.eos_ids == (7, 2)
    assert load_tokenizer(write_folder(tmp_path, config={"eos_token_id": 5})).eos_ids == (5, 2)
    assert load_tokenizer(write_folder(tmp_path, generation_config={"eos_token_id": [9, 8]})).eos_ids == (9, 8, 2)


def test_an_end_that_is_one_byte_of_text_is_text_in_a_grammar_unless_it_is_the_only_end(tmp_path: Path) -> None:
    config = {"eos_token": "<|im_end|>"}
    both = load_tokenizer(write_folder(tmp_path, tokenizer_config=config, config={"eos_token_id": [305, 64, 2, 9999]}))
    assert (both.token_bytes(64), both.eos_ids) == (b"^", (305, 64, 2, 9999))
    assert both.grammar_end_ids == (305, 2, 9999)
    (tmp_path / "alone").mkdir()
    alone = load_tokenizer(write_folder(tmp_path / "alone", config={"eos_token_id": 64}))
    assert alone.grammar_end_ids == alone.eos_ids == (64,)


def test_tokens_that_only_the_configuration_knows_are_added(tmp_path: Path) -> None:
    added = {"600": {"content": "<tool>", "special": False}, "601": {"content": "<end>", "special": True}}
    config = {"eos_token": "<end>", "added_tokens_decoder": added, "model_max_length": 2048}
    tokenizer = load_tokenizer(write_folder(tmp_path, tokenizer_config=config))
    assert tokenizer.encode("a<tool>b<end>")[1::2] == [600, 601]
    assert tokenizer.decode([600, 601]) == "<tool>"
    assert (tokenizer.eos_ids, tokenizer.vocab_size, tokenizer.max_length) == ((601,), 602, 2048)


def test_chat_templates_are_found_where_transformers_finds_them(tmp_path: Path) -> None:
    def rendered(source: ModelSource, tools: Any = None) -> str:
        template = load_tokenizer(source).chat_template
        assert template is not None
        return template.render([{"role": "user", "content": "x"}], tools=tools)

    source = write_folder(tmp_path, processor_config={"chat_template": "processor"})
    assert rendered(source) == "processor"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    write_folder(tmp_path, tokenizer_config={"chat_template": named})
    assert (rendered(source), rendered(source, tools=[])) == ("plain", "tools")
    write_folder(tmp_path, chat_template={"chat_template": "json"})
    assert rendered(source) == "json"
    write_folder(tmp_path, chat_template="jinja")
    assert rendered(source) == "jinja"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("more")
    assert (rendered(source), rendered(source, tools=[])) == ("jinja", "more")
    (tmp_path / "other.json").write_text('{"chat_template": "own"}')
    assert rendered(source_of(tmp_path, tokenizer_config_path=str(tmp_path / "other.json"))) == "own"


def test_a_gguf_files_template_gives_way_to_the_users_own(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "v.gguf", template="{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    (tmp_path / "own.jinja").write_text("own")
    found = load_tokenizer(local_source(path)).chat_template
    own = load_tokenizer(
        ModelSource("m", str(path), "gguf", tokenizer_config_path=str(tmp_path / "own.jinja"))
    ).chat_template
    assert found is not None
    assert own is not None
    assert found.render([{"role": "user", "content": "x"}]) == "<|im_start|>x<|im_end|>"
    assert own.render([{"role": "user", "content": "x"}]) == "own"


def test_what_cannot_be_read_is_named_with_its_cure(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no tokenizer.json.*vocab.json.*save_pretrained"):
        load_tokenizer(source_of(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer.json cannot be read: it is not JSON: it ends early"):
        load_tokenizer(source_of(tmp_path))
    with pytest.raises(ModelError, match=r"nowhere.json does not exist"):
        load_tokenizer(source_of(tmp_path, tokenizer_config_path=str(tmp_path / "nowhere.json")))
    write_folder(tmp_path, tokenizer_config=[])
    with pytest.raises(ModelError, match=r"must hold a JSON object"):
        load_tokenizer(source_of(tmp_path))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 2000), st.integers(0, 255))
def test_a_broken_sentencepiece_file_is_a_value_error_and_nothing_else(junk: bytes, at: int, byte: int) -> None:
    good = sentencepiece_model("bpe_identity")[:2000]
    for content in (junk, good[:at], good[:at] + bytes([byte]) + good[at + 1 :]):
        try:
            found = sentencepiece.parse(content)
        except ValueError:
            continue
        assert all(isinstance(piece, str) for piece in found.pieces)


@pytest.mark.parametrize("content", [b"", b"\x0a\xff", b"hello", b"\x0a\x05\x0a\x03abc\x12\x02\x18\x09"])
def test_a_file_that_is_no_sentencepiece_model_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(StartError, match=r"tokenizer.model is no SentencePiece model"):
        load_tokenizer(source_of(tmp_path))


@pytest.mark.parametrize("unigram", [False, True])
def test_a_normalization_that_is_junk_ends_no_process(unigram: bool, tmp_path: Path) -> None:
    found = sentencepiece.Vocabulary(["<unk>", "a"], [0.0, -1.0], [2, 1], unigram=unigram, charsmap=b"junk")
    told = r"cannot be read: it is none that tokenizers [\d.]+ takes. Download"
    with pytest.raises(ModelError, match=told), reading(tmp_path):
        sentencepiece.build(found)
    found.charsmap = b"\x04\x00\x00\x00junkjunk"  # builds, and makes the library panic when it is used
    tokenizer = Tokenizer(sentencepiece.build(found))
    with pytest.raises(ValidationError, match="tokenizer error"):
        tokenizer.encode("abc")


def test_reading_a_tokenizer_changes_no_file_and_asks_no_network(tmp_path: Path) -> None:
    source = write_folder(tmp_path, tokenizer_config={"tokenizer_class": "LlamaTokenizer", "bos_token": "<|im_start|>"})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    load_tokenizer(source)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).post_processor is None


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("wished", [True, False, None])
def test_a_space_before_the_first_word_is_what_the_configuration_says(
    saved: bool, wished: bool | None, tmp_path: Path
) -> None:
    more = {} if wished is None else {"add_prefix_space": wished}
    source = write_folder(tmp_path, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", **more})
    inner = byte_level()
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=saved)
    inner.save(str(tmp_path / "tokenizer.json"))
    without = byte_level()  # transformers 4 changes the saved setting, by default to false
    assert load_tokenizer(source).encode("the work") == without.encode(" the work" if wished else "the work").ids
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(source).encode("the work") == inner.encode("the work").ids


def test_templates_know_the_special_tokens_that_transformers_4_tells_them(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ image_token }}{{ additional_special_tokens }}{{ cls_token }}"
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": None,
        "additional_special_tokens": ["<|endoftext|>", "<|im_end|>"],
        "extra_special_tokens": {"image_token": "<image>"},
        "chat_template": template,
    }
    source = write_folder(tmp_path, tokenizer_config=config)
    found = load_tokenizer(source).chat_template
    assert found is not None
    chat = [{"role": "user", "content": "x"}]
    told = "<|im_start|><|im_end|><image>['<|endoftext|>', '<|im_end|>']"
    assert found.render(chat, add_generation_prompt=True) == told
