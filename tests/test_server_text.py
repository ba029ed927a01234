"""Text through the whole server, with vocabularies of several families: streams equal plain answers."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
from support_ports import unused_port
from support_server import Server, byte_model
from support_slow import mostly_slow
from support_text import recorded, sentencepiece_model
from tokenizers import decoders, models, normalizers, pre_tokenizers

from tokenmill.text.load import load_tokenizer
from tokenmill.text.pieces import byte_characters
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.weights.source import ModelSource

TEXT = "naïve 日本語 🙂👨‍👩‍👧 the licensed work, of others.\n\n\tא ½"
WORDS = "the works , naive 日本 working the works ."


def word_pieces(folder: Path) -> str:
    words = "[UNK] [CLS] [SEP] the work ##s ##ing , . do n't naive ¿ 日 本".split()
    inner = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    inner.save(str(folder / "tokenizer.json"))
    return WORDS


def family(name: str, folder: Path) -> str:
    """Write the files of a vocabulary into a model's folder. Return the text that the model answers."""
    (folder / "tokenizer.json").unlink()
    config: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text())
    text = TEXT
    if name == "tiktoken":
        byte_of = byte_characters()
        spelled = [bytes(byte_of[letter] for letter in token) for token in recorded("llamacpp.json")["tokens"][3:]]
        lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(spelled)]
        (folder / "a.tiktoken").write_bytes(b"".join(lines))
        config["added_tokens_decoder"] = {
            "600": {"content": "<s>", "special": True},
            "601": {"content": "</s>", "special": True},
        }
    elif name == "word pieces":
        text = word_pieces(folder)
    else:
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(name))
        config["tokenizer_class"] = "LlamaTokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return text


@lru_cache
def client() -> httpx.Client:
    return httpx.Client(timeout=30)


def post(server: Server, path: str, body: Any) -> httpx.Response:
    return client().post(server.url + path, json=body)


def events(server: Server, path: str, body: Any) -> list[Any]:
    """Return the events of a stream, without its end."""
    found = post(server, path, body).text.split("\n\n")
    return [json.loads(event.removeprefix("data: ")) for event in found if event not in ("", "data: [DONE]")]


NAMES = ["tiktoken", "word pieces", "bpe_identity", "unigram_nmt_nfkc"]


@pytest.fixture(scope="module", params=mostly_slow(NAMES, NAMES[:2]))
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Tokenizer]]:
    folder = byte_model(tmp_path_factory.mktemp("model"))
    text = family(request.param, folder)
    port = unused_port()
    server = Server(folder, port, "--mock-text", text, "--mock-step-ms", "0", "--max-total-tokens", "500")
    yield server, load_tokenizer(ModelSource(str(folder), str(folder), "safetensors"))
    server.stop()


def test_native_streams_equal_plain_answers_at_every_length(served: tuple[Server, Tokenizer]) -> None:
    server, tokenizer = served
    text = WORDS if tokenizer.token_id("##s") is not None else TEXT
    ids = tokenizer.encode(text, add_special_tokens=False)
    prompt = tokenizer.encode("the")
    for count in range(1, len(ids), 5):
        body = {"inputs": "the", "parameters": {"max_new_tokens": count, "details": True}}
        plain = post(server, "/generate", body).json()
        chunks = events(server, "/generate_stream", body)
        tokens = plain["details"]["tokens"]
        assert [token["id"] for token in tokens] == [event["token"]["id"] for event in chunks] == ids[:count]
        assert tokens == [event["token"] for event in chunks]
        assert chunks[-1]["generated_text"] == plain["generated_text"]
        whole = tokenizer.decode(prompt + ids[:count])[len(tokenizer.decode(prompt)) :]
        assert plain["generated_text"] == whole.rstrip("\ufffd")
        assert "".join(token["text"] for token in tokens if not token["special"]) == plain["generated_text"]


@pytest.mark.parametrize("include", [True, False])
def test_stop_strings_are_found_wherever_tokens_are_cut(served: tuple[Server, Tokenizer], include: bool) -> None:
    server, _ = served
    said = post(server, "/generate", {"inputs": "the", "parameters": {"max_new_tokens": 60}}).json()["generated_text"]
    for start in range(1, len(said) - 3, 9):
        stop = said[start : start + 3]
        before = said[: said.index(stop)]
        if include:  # TGI keeps the string
            body = {"inputs": "the", "parameters": {"max_new_tokens": 60, "stop": [stop], "details": True}}
            plain = post(server, "/generate", body).json()
            assert plain["generated_text"] == before + stop
            assert plain["details"]["finish_reason"] == "stop_sequence"
            assert events(server, "/generate_stream", body)[-1]["generated_text"] == before + stop
            continue
        chat = {"prompt": "the", "max_tokens": 60, "stop": stop}
        choice = post(server, "/v1/completions", chat).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (before, "stop")
        chunks = events(server, "/v1/completions", {**chat, "stream": True})
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]) == before


def test_offsets_are_bytes_of_the_input_in_every_family(served: tuple[Server, Tokenizer]) -> None:
    server, tokenizer = served
    text = "the work 日本 naïve ½"
    found = post(server, "/tokenize", {"inputs": text}).json()
    assert [token["id"] for token in found] == tokenizer.encode(text)
    raw = text.encode()
    for token in found:
        assert token["text"] == raw[token["start"] : token["stop"]].decode(errors="replace")
    at = [(token["start"], token["stop"]) for token in found if token["stop"]]
    assert at == sorted(at)
    assert raw[: at[-1][1]].replace(b" ", b"") == raw.replace(b" ", b"")
