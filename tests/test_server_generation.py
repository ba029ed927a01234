"""One sequence from the engine's outputs to tokens of an answer, for any division into outputs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from support_server import byte_model

from tokenmill.errors import RequestError
from tokenmill.server.generation import GeneratedToken, Generation, Timings
from tokenmill.server.routes.chat import ChatAnswer
from tokenmill.server.routes.completions import CompletionAnswer, Counts
from tokenmill.server.routes.native import NativeAnswer
from tokenmill.server.schema.native import GenerateParameters
from tokenmill.server.schema.openai import CompletionRequest
from tokenmill.text.detokenizer import Detokenizer
from tokenmill.text.load import load_tokenizer
from tokenmill.text.prepare import Prepared
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.weights.source import local_source
from tokenmill.wire.messages import Output, PromptDetails, SamplingParams, StoppingParams, TokenDetails


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Return a tokenizer of bytes, and of words that a few merges make: "quick" is one token."""
    folder = byte_model(tmp_path_factory.mktemp("model"))
    content = json.loads((folder / "tokenizer.json").read_text())
    for left, right in (("q", "u"), ("qu", "i"), ("qui", "c"), ("quic", "k")):
        content["model"]["merges"].append([left, right])
        content["model"]["vocab"][left + right] = len(content["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return load_tokenizer(local_source(folder))


class Answer:
    """Recorder of a generation's results."""

    def __init__(self) -> None:
        self.tokens: list[GeneratedToken] = []
        self.error: RequestError | None = None

    def token(self, generation: Generation, token: GeneratedToken) -> None:
        self.tokens.append(token)

    def failed(self, generation: Generation, error: RequestError) -> None:
        self.error = error


def generation_of(tokenizer: Tokenizer, stop: tuple[str, ...] = (), keep: bool = False) -> tuple[Generation, Answer]:
    prepared = Prepared((5,), SamplingParams(), StoppingParams(100), stop, None)
    answer = Answer()
    text = Detokenizer(tokenizer, stop, include_stop=keep)
    return Generation(1, prepared, text, answer, Timings(0.0), lambda seconds: None), answer


def test_the_answer_does_not_depend_on_how_outputs_are_cut(tokenizer: Tokenizer) -> None:
    numbers = random.Random(0)
    for _ in range(200):
        text = "".join(numbers.choice(["quick ", "ü", "🦊", "b", "</"]) for _ in range(numbers.randrange(1, 12)))
        stop = tuple(numbers.sample(["bü", "🦊q", "zz"], numbers.randrange(0, 3)))
        ids = tokenizer.encode(text, add_special_tokens=False)
        generation, answer = generation_of(tokenizer, stop)
        generation.push(Output(1, num_cached=3), 0.1)
        while ids:
            count = numbers.randrange(1, 4)
            now, ids = ids[:count], ids[count:]
            if generation.push(Output(1, tuple(now), "" if ids else "length"), 0.2):
                break
        where = min((text.find(s) for s in stop if s in text), default=None)
        whole = text if where is None else text[:where]
        assert "".join(token.text for token in answer.tokens) == generation.text == whole
        assert generation.finish == ("length" if where is None else "stop")
        assert [token.index for token in answer.tokens] == list(range(1, generation.num_generated + 1))
        assert generation.num_cached == 3


def test_tokens_after_a_stop_string_in_the_same_output_are_dropped(tokenizer: Tokenizer) -> None:
    generation, answer = generation_of(tokenizer, ("b",))
    ids = tokenizer.encode("abcd", add_special_tokens=False)
    assert generation.push(Output(1, tuple(ids), "length"), 1.0)
    assert (generation.text, generation.num_generated, generation.finish) == ("a", 2, "stop")
    assert len(answer.tokens) == 2


def test_a_stop_string_inside_a_token_cuts_the_token_in_native_answers(tokenizer: Tokenizer) -> None:
    generation, answer = generation_of(tokenizer, ("ui",), keep=True)
    ids = tokenizer.encode("a quick", add_special_tokens=False)
    assert len(ids) == 3
    assert generation.push(Output(1, tuple(ids), "", tuple(TokenDetails(-1.0) for _ in ids)), 1.0)
    native = NativeAnswer(GenerateParameters(details=True), tokenizer, "", as_list=False)
    events = [msgspec.json.decode(native.chunk(generation, token)) for token in answer.tokens]
    assert [event["token"]["text"] for event in events] == ["a", " ", "qui"]
    plain = msgspec.json.decode(native.fold([generation], [answer.tokens]))
    assert "".join(token["text"] for token in plain["details"]["tokens"]) == plain["generated_text"] == "a qui"


def test_an_end_of_sequence_wins_over_length_and_frees_what_was_held_back(tokenizer: Tokenizer) -> None:
    generation, answer = generation_of(tokenizer, ("bz",))
    (letter,) = tokenizer.encode("b", add_special_tokens=False)
    assert not generation.push(Output(1, (letter,)), 1.0)
    assert answer.tokens[0].text == ""
    assert generation.push(Output(1, (0,), "stop"), 1.0)
    assert (answer.tokens[1].text, answer.tokens[1].special, generation.finish) == ("b", True, "eos")


@pytest.mark.parametrize("output", [Output(1, (), "error", message="no room"), Output(1, (), "length")])
def test_a_sequence_without_a_result_fails_with_a_reason(tokenizer: Tokenizer, output: Output) -> None:
    generation, answer = generation_of(tokenizer)
    assert generation.push(output, 1.0)
    assert answer.error is not None
    assert str(answer.error).startswith("Server error: ")


def test_times_are_those_of_the_first_and_the_last_token(tokenizer: Tokenizer) -> None:
    gaps: list[float] = []
    prepared = Prepared((5,), SamplingParams(), StoppingParams(100), (), None)
    generation = Generation(1, prepared, Detokenizer(tokenizer), Answer(), Timings(1.0, 2.0), gaps.append)
    generation.push(Output(1), 3.0)
    for now in (4.0, 6.0, 9.0):
        generation.push(Output(1, (7,), "length" if now == 9.0 else ""), now)
    times = generation.timings
    assert (times.arrived, times.submitted, times.admitted, times.first, times.last) == (1.0, 2.0, 3.0, 4.0, 9.0)
    assert gaps == [2.0, 3.0]


def test_a_folder_of_bytes_is_enough_for_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(local_source(byte_model(tmp_path)))
    assert tokenizer.decode(tokenizer.encode("naïve 🦊")) == "naïve 🦊"


def test_openais_routes_tell_as_many_alternatives_as_asked_for_though_more_tie(tokenizer: Tokenizer) -> None:
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    tie = TokenDetails(-0.5, (b, c, a), (-0.5, -0.5, -0.5))
    envelope: Any = SimpleNamespace(
        tokenizer=tokenizer, id="x", created=1, model="m", fingerprint="f", include_usage=False,
        service_tier=msgspec.UNSET, usage=lambda generations: None,
    )  # fmt: skip
    generation, answer = generation_of(tokenizer)
    generation.push(Output(1, (a,), "", (tie,)), 0.0)
    body = CompletionRequest(prompt="", logprobs=2)
    completion = CompletionAnswer(envelope, body, [""], [generation.prepared], Counts(1, 1))
    for shapes, path in ((ChatAnswer(envelope, 2), ("content", 0)), (completion, ("top_logprobs", 0))):
        (choice,) = json.loads(shapes.chunk(generation, answer.tokens[0]))["choices"]
        name, index = path
        found = choice["logprobs"][name][index]
        texts = list(found) if name == "top_logprobs" else [one["token"] for one in found["top_logprobs"]]
        assert texts[:2] == ["b", "c"]
        assert len(texts) == (3 if name == "top_logprobs" else 2)  # completions also list the chosen one


def test_details_of_a_prompt_that_is_computed_again_are_kept_once(tokenizer: Tokenizer) -> None:
    generation, answer = generation_of(tokenizer)
    parts = [(1, 3), (1, 5), (4, 2), (6, 2), (1, 7), (8, 0), (8, 1)]  # first position and number; preempted thrice
    for start, count in parts:
        details = tuple(TokenDetails(float(position)) for position in range(start, start + count))
        assert not generation.push(Output(1, payload=PromptDetails(start, details)), 0.0)
    assert [detail.logprob for detail in generation.prompt_details] == list(range(1, 9))
    assert not answer.tokens
