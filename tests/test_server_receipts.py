"""Receipts and fingerprints: costs and origin of an answer, for requests that ask for them only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support_server import Server, byte_model, scripted

from tokenmill.server.digests import engine_digest, fingerprint, model_digest
from tokenmill.weights.source import ModelSource, local_source
from tokenmill.wire.messages import EngineInfo

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with scripted(tmp_path_factory.mktemp("model"), step_ms=5) as running:
        yield running


def chat(server: Server, headers: dict[str, str] | None = None, **fields: Any) -> Any:
    body = {"messages": USER, "max_tokens": 5, **fields}
    response = server.post("/v1/chat/completions", body, headers=headers or {})
    assert response.status_code == 200, response.text
    return response.json()


def test_who_does_not_ask_gets_none(server: Server) -> None:
    assert "receipt" not in chat(server)
    assert "receipt" not in chat(server, receipt=False)
    assert "receipt" not in chat(server, {"x-receipt": "0"})
    assert "receipt" not in chat(server, {"x-receipt": "1"}, receipt=False)  # the body takes precedence


@pytest.mark.parametrize(
    "how", [{"receipt": True}, {"headers": {"x-receipt": "1"}}, {"headers": {"x-receipt": "true"}}]
)
def test_a_receipt_tells_times_and_counts(server: Server, how: dict[str, Any]) -> None:
    body = chat(server, **how)
    assert list(body)[-1] == "receipt"
    receipt = body["receipt"]
    assert receipt["queue_ms"] + receipt["prefill_ms"] + receipt["decode_ms"] <= receipt["total_ms"] < 5000
    assert receipt["decode_ms"] >= 10  # four steps of 5 ms after the first token, which is a little late itself
    assert receipt["prefill_ms"] >= 2
    assert receipt["generated_tokens"] == 5
    assert receipt["prompt_tokens"] == body["usage"]["prompt_tokens"]
    assert (receipt["preemptions"], receipt["largest_batch"], receipt["truncated_tokens"]) == (0, 1, 0)
    assert receipt["model"] == body["model"]
    assert body["system_fingerprint"] == fingerprint(
        receipt["version"], "", receipt["model_digest"], receipt["engine_digest"]
    )
    assert "sequences" not in receipt


def test_a_receipt_has_the_requests_id(server: Server) -> None:
    assert chat(server, {"x-request-id": "mine-1"}, receipt=True)["receipt"]["request_id"] == "mine-1"


def test_parameters_are_those_that_held(server: Server) -> None:
    asked = {"temperature": 0.5, "top_p": 0.9, "top_k": -1, "stop": "x", "seed": -1, "logit_bias": {"5": -1.5}}
    held = chat(server, receipt=True, **asked)["receipt"]["parameters"]
    assert held["max_tokens"] == 5
    assert (held["temperature"], held["top_p"], held["top_k"], held["repetition_penalty"]) == (0.5, 0.9, 0, 1.0)
    assert (held["stop"], held["seed"], held["logit_bias"], held["logprobs"]) == (["x"], 2**64 - 1, {"5": -1.5}, None)
    assert held["do_sample"] is True
    greedy = chat(server, receipt=True, temperature=0)["receipt"]["parameters"]
    assert (greedy["do_sample"], greedy["seed"]) == (False, None)
    unlimited = chat(server, receipt=True, max_tokens=None, stop=" ")
    assert unlimited["receipt"]["parameters"]["max_tokens"] == 500 - unlimited["usage"]["prompt_tokens"]


def test_several_sequences_are_told_apart(server: Server) -> None:
    body = chat(server, receipt=True, n=3, temperature=1.0, seed=7)
    receipt = body["receipt"]
    assert [one["index"] for one in receipt["sequences"]] == [0, 1, 2]
    assert [one["seed"] for one in receipt["sequences"]] == [7, 8, 9]
    assert receipt["generated_tokens"] == sum(one["generated_tokens"] for one in receipt["sequences"]) == 15
    assert receipt["prompt_tokens"] == body["usage"]["prompt_tokens"]
    assert receipt["largest_batch"] == 3
    both = server.post("/v1/completions", {"prompt": ["a", "bc"], "max_tokens": 2, "receipt": True}).json()["receipt"]
    assert [(one["prompt"], one["prompt_tokens"]) for one in both["sequences"]] == [(0, 1), (1, 2)]


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_in_a_stream_the_last_chunk_has_it(server: Server, usage: bool, n: int) -> None:
    asked = {"messages": USER, "max_tokens": 3, "n": n, "receipt": True, "stream": True}
    *chunks, done = server.events("/v1/chat/completions", {**asked, "stream_options": {"include_usage": usage}})
    assert done == "[DONE]"
    assert ["receipt" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert len(chunks) == 3 * n + usage
    assert chunks[-1]["receipt"]["generated_tokens"] == 3 * n


def test_native_answers_have_it_too(server: Server) -> None:
    asked = {"inputs": "ab", "parameters": {"max_new_tokens": 3}}
    headers = {"x-receipt": "1"}
    plain = server.post("/generate", asked, headers=headers).json()
    assert plain["receipt"]["parameters"]["max_new_tokens"] == 3
    (listed,) = server.post("/", asked, headers=headers).json()
    assert listed["receipt"]["generated_tokens"] == 3
    assert server.post("/generate", {**asked, "receipt": True}).json()["receipt"]["generated_tokens"] == 3
    *first, last = server.events("/generate_stream", {**asked, "receipt": True})
    assert [event.get("receipt") for event in first] == [None, None]
    assert last["receipt"]["generated_tokens"] == 3
    assert "receipt" not in server.post("/generate", asked).json()
    several = server.post("/vertex", {"instances": [asked, asked]}, headers=headers).json()
    assert len(several["predictions"]) == len(several["receipt"]["sequences"]) == 2


def test_what_was_cut_off_a_prompt_is_told(server: Server) -> None:
    asked = {"inputs": "abcdef", "parameters": {"max_new_tokens": 2, "truncate": 4}}
    plain = server.post("/generate", {**asked, "receipt": True})
    assert (plain.headers["x-truncated-tokens"], plain.headers["x-prompt-tokens"]) == ("2", "4")
    assert (plain.json()["receipt"]["truncated_tokens"], plain.json()["receipt"]["prompt_tokens"]) == (2, 4)
    stream = server.post("/v1/completions", {"prompt": "abcdef", "truncate": 4, "max_tokens": 2, "stream": True})
    assert stream.headers["x-truncated-tokens"] == "2"
    assert "x-truncated-tokens" not in server.post("/generate", {"inputs": "ab"}).headers


INFO = EngineInfo("m", "float32", "cpu", "cpu", 100, 16, 300, 499, 500, 512, 8)


def test_an_engine_that_computes_otherwise_has_another_digest() -> None:
    same = engine_digest(INFO, "1.0")
    assert engine_digest(msgspec.structs.replace(INFO, num_blocks=7, max_total_tokens=9, model_id="n"), "1.0") == same
    others = [
        engine_digest(INFO, "1.1"),
        engine_digest(INFO, "1.0", "fp8"),
        *(
            engine_digest(msgspec.structs.replace(INFO, **{name: value}), "1.0")
            for name, value in {"dtype": "bfloat16", "backend": "torch", "quantize": "q4", "num_shard": 2}.items()
        ),
    ]
    assert len({same, *others}) == len(others) + 1


def test_a_model_whose_files_differ_has_another_digest(tmp_path: Path) -> None:
    folder = byte_model(tmp_path)
    digests = [model_digest(local_source(folder))]
    assert model_digest(local_source(folder, "another name")) == digests[0]
    for name in ("config.json", "tokenizer_config.json", "model.safetensors"):
        with (folder / name).open("ab") as file:
            file.write(b" ")
        digests.append(model_digest(ModelSource("m", str(folder), "safetensors")))
    assert len(set(digests)) == 4


def test_of_a_long_file_parts_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"

    def digest(at: int, byte: bytes) -> str:
        with path.open("wb") as file:
            file.truncate(100 << 20)
            file.seek(at)
            file.write(byte)
        return model_digest(ModelSource("m", str(path), "gguf"))

    whole = digest(0, b"\0")
    assert digest(0, b"x") != whole
    assert digest((100 << 20) - 1, b"x") != whole
    assert digest(100 << 20, b"x") != whole  # one byte longer
    assert digest(0, b"\0") == whole


def test_a_fingerprint_has_tgis_form() -> None:
    one = fingerprint("1.2.3", "", "aa", "bb")
    assert one.startswith("1.2.3+")
    assert one.endswith("-native")
    assert len({one, fingerprint("1.2.3", "", "aa", "bc"), fingerprint("1.2.3", "", "ab", "bb")}) == 3
    assert fingerprint("1.2.3", "sha-1a2b", "aa", "bb").endswith("-sha-1a2b")
