"""lm-eval's `local-completions` over echo and logprobs: its scores equal those of transformers.

The tasks in `lm_eval_tasks/` are multiple choice, perplexity of whole texts, and generation up to a stop string. The
results are computed again by transformers over the dequantized weights (`reference.py`).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from clients.conftest import SERVER_PYTHON, start

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("tenacity", reason="lm-eval's extra `api` is not installed")

HERE = Path(__file__).resolve().parent
FRONT = [1]  # <|im_start|>: lm-eval puts it before a text without a context


class Reference(NamedTuple):
    """transformers in a process of its own. `tokenizer`: a folder with its tokenizer. `known`: cached answers."""

    process: subprocess.Popen[str]
    tokenizer: Path
    known: dict[str, tuple[float, bool]]

    def score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Return the log-likelihood of the continuation after the context, and True if greedy search gives it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        line = json.dumps([context, continuation])
        if line not in self.known:
            print(line, file=self.process.stdin, flush=True)
            likelihood, greedy = json.loads(self.process.stdout.readline())
            self.known[line] = likelihood, greedy
        return self.known[line]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    probe = subprocess.run([SERVER_PYTHON, "-c", "import torch, transformers, gguf"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("the server's environment has no torch, transformers and gguf")
    folder = tmp_path_factory.mktemp("tokenizer")
    with subprocess.Popen(
        [SERVER_PYTHON, str(HERE / "reference.py"), str(folder)],
        env=os.environ | {"PYTHONPATH": str(HERE.parent.parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "tokenizer\n"
        yield Reference(process, folder, {})
        assert process.stdin is not None
        process.stdin.close()


def evaluate(url: str, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return lm-eval's results and samples of the three tasks."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.chdir(HERE / "lm_eval_tasks")  # the tasks name their data relative to it
    return lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "tgi",
            "base_url": f"{url}/v1/completions",
            "tokenizer_backend": "huggingface",
            "tokenizer": str(tokenizer),
            "num_concurrent": 2,
            "batch_size": 3,
        },
        tasks=["tokenmill_capitals", "tokenmill_texts", "tokenmill_continuations"],
        task_manager=lm_eval.tasks.TaskManager(include_path=".", include_defaults=False),
        bootstrap_iters=0,
    )


def check(found: Any, reference: Reference, near: float) -> None:
    """Assert equal scores, and log-likelihoods within `near` per token of transformers', over long texts a tenth."""
    import tokenizers

    encode = tokenizers.Tokenizer.from_file(str(reference.tokenizer / "tokenizer.json")).encode

    def ids(text: str) -> list[int]:
        return list(encode(text, add_special_tokens=False).ids)

    chosen = []
    for sample in found["samples"]["tokenmill_capitals"]:
        want = [reference.score(ids(context), ids(end)) for context, end in sample["arguments"]]
        for (got, got_greedy), (likelihood, greedy), (_, end) in zip(
            sample["filtered_resps"], want, sample["arguments"], strict=True
        ):
            assert got == pytest.approx(likelihood, abs=near * len(ids(end)))
            assert got_greedy is greedy
        best = max(range(len(want)), key=lambda i: want[i][0])
        chosen.append(best == sample["target"])
    assert found["results"]["tokenmill_capitals"]["acc,none"] == sum(chosen) / len(chosen)

    for sample in found["samples"]["tokenmill_texts"]:
        text = ids(sample["target"])
        likelihood, _ = reference.score(FRONT, text)
        assert sample["filtered_resps"][0] == pytest.approx(likelihood, abs=near / 10 * len(text))

    assert found["results"]["tokenmill_continuations"]["exact_match,none"] == 1.0
    for sample in found["samples"]["tokenmill_continuations"]:
        begin, end = ids(sample["arguments"][0][0]), ids(sample["target"])
        assert reference.score(begin, end)[1], "transformers goes on in the same way"


def test_the_cpu_engines_scores_are_near(url: str, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    check(evaluate(url, reference.tokenizer, monkeypatch), reference, near=0.5)  # it rounds activations to 8 bits


def test_the_torch_backends_scores_are_the_same(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start("--backend", "torch")
    try:
        check(evaluate(server.url, reference.tokenizer, monkeypatch), reference, near=1e-3)
    finally:
        server.stop()
