"""Grammars of a model: prepared in units while idle, at once for the first request, and never twice."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from support_server import byte_model

from tokenmill.errors import GrammarError
from tokenmill.grammar import llguidance
from tokenmill.runtime import grammars
from tokenmill.runtime.grammars import ModelGrammars
from tokenmill.weights.source import ModelSource
from tokenmill.wire.messages import GrammarSpec

SPEC = GrammarSpec("regex", "ab+")


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    return ModelSource("bytes", str(byte_model(tmp_path)), "safetensors")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of objects made, in order."""
    found: list[str] = []
    load, backend, pool = grammars.load_tokenizer, llguidance.LLGuidance, grammars.CompilePool
    monkeypatch.setattr(grammars, "load_tokenizer", lambda source: found.append("tokenizer") or load(source))
    monkeypatch.setattr(llguidance, "LLGuidance", lambda *given: found.append("backend") or backend(*given))
    monkeypatch.setattr(grammars, "CompilePool", lambda *given, **more: found.append("pool") or pool(*given, **more))
    return found


def test_nothing_is_loaded_before_the_first_request_or_idle_time(source: ModelSource, made: list[str]) -> None:
    ModelGrammars(source, 258).close()
    assert made == []


def test_a_call_begins_one_piece_and_no_second_beside_it(
    source: ModelSource, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held, load = threading.Event(), grammars.load_tokenizer
    monkeypatch.setattr(grammars, "load_tokenizer", lambda source: held.wait(60) and load(source))
    model = ModelGrammars(source, 258)
    try:
        for _ in range(5):
            model.prepare()
        held.set()
        model._executor.submit(int).result(60)  # waits for the unit that was begun
        assert made == ["tokenizer"]
        for piece in ("backend", "pool"):
            while made[-1] != piece:
                model.prepare()
                time.sleep(0.002)
        for _ in range(5):
            model.prepare()
        assert model.compile(SPEC).result(60).nbytes > 0
        assert made == ["tokenizer", "backend", "pool"]
    finally:
        model.close()


@pytest.mark.parametrize("pieces", [0, 1, 2])
def test_the_first_grammar_has_the_rest_made_at_once(source: ModelSource, made: list[str], pieces: int) -> None:
    model = ModelGrammars(source, 258)
    try:
        for count in range(pieces):
            while len(made) == count:
                model.prepare()
                time.sleep(0.002)
        both = [model.compile(SPEC), model.compile(GrammarSpec("regex", "c"))]
        assert both[0].result(60).nbytes > 0
        assert both[1].result(60).nbytes > 0
        assert made == ["tokenizer", "backend", "pool"]
    finally:
        model.close()


def test_each_request_for_a_grammar_gets_the_error_of_its_preparation(source: ModelSource) -> None:
    model = ModelGrammars(source, 0)  # the id of the end token is beyond the logits
    model.prepare()
    for _ in range(2):
        with pytest.raises(GrammarError, match="no token that ends an answer"):
            model.compile(SPEC).result(60)
    model.close()


def test_closing_fails_what_waits(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, load = threading.Event(), grammars.load_tokenizer
    monkeypatch.setattr(grammars, "load_tokenizer", lambda source: begun.set() or time.sleep(0.2) or load(source))
    model = ModelGrammars(source, 258)
    model.prepare()
    begun.wait(60)
    waiting = model.compile(SPEC)
    model.close()
    model.close()
    assert waiting.done()
    assert waiting.exception(0) is not None
