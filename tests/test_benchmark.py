"""`text-generation-benchmark`: its options, its tables, and one real run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tokenmill import benchmark, cli
from tokenmill.benchmark import Run, Wanted, tables

# TGI 3.3: option, its short form, its default
OPTIONS = """
--sequence-length -s 10
--decode-length -d 8
--runs -r 10
--warmups -w 1
--master-shard-uds-path -m /tmp/text-generation-server-0
""".split("\n")[1:-1]


@pytest.mark.parametrize("line", OPTIONS)
def test_options_have_tgis_names_and_defaults(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    flag, short, default = line.split()
    assert str(getattr(Wanted(), flag[2:].replace("-", "_"))) == default
    with pytest.raises(SystemExit):
        cli.text_generation_benchmark(["--help"])
    assert f"{flag}" in (shown := capsys.readouterr().out)
    assert f"{short} " in shown
    assert "[default 1 2 4 8 16 32]" in shown


@pytest.mark.parametrize("words", [["--runs", "0"], ["-b", "0"], ["--sequence-lenght", "3"]])
def test_wrong_usage_exits_with_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.text_generation_benchmark(words)
    assert stopped.value.code == 2


def test_sampling_is_greedy_unless_something_asks_for_it() -> None:
    assert Wanted().sampling().greedy
    assert Wanted(do_sample=True).sampling().temperature == 1.0
    assert Wanted(top_k=3).sampling().top_k == 3
    assert not Wanted(top_p=0.5).sampling().greedy


def test_tables_have_tgis_numbers() -> None:
    results = {2: [Run(0.1, 0.4), Run(0.3, 0.8)]}
    text = tables("m", Wanted(decode_length=5), results)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line]
    assert rows[0] == ["Parameter", "Value"]
    assert ["Decode Length", "5"] in rows
    by_step = {tuple(row[:2]): row[2:] for row in rows if len(row) == 8}
    assert by_step["Prefill", "2"] == ["200.00 ms", "100.00 ms", "300.00 ms", "300.00 ms", "300.00 ms", "300.00 ms"]
    assert by_step["Decode (token)", "2"][:3] == ["150.00 ms", "100.00 ms", "200.00 ms"]
    assert by_step["Decode (total)", "2"][:3] == ["600.00 ms", "400.00 ms", "800.00 ms"]
    rates = {row[0]: row[2:] for row in rows if len(row) == 5}
    assert rates["Prefill"] == ["13.33 tokens/secs", "6.67 tokens/secs", "20.00 tokens/secs"]  # of 2 prompts
    assert rates["Decode"] == ["15.00 tokens/secs", "10.00 tokens/secs", "20.00 tokens/secs"]  # of 8 tokens


def test_a_run_computes_every_prompt_anew(
    embedded_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cached: list[int] = []
    inner = benchmark.OfflineEngine.outputs

    def watched(self, request_id):  # type: ignore[no-untyped-def]
        for output in inner(self, request_id):
            cached.append(output.num_cached)
            yield output

    monkeypatch.setattr(benchmark.OfflineEngine, "outputs", watched)
    monkeypatch.setenv("TOKENMILL_CPU_THREADS", "1")
    words = ["-t", str(embedded_model), "-b", "2", "-s", "40", "-d", "3", "-r", "1", "-w", "1"]
    assert cli.text_generation_benchmark(words) == 0
    assert cached
    assert not any(cached)
    shown = capsys.readouterr().out
    assert re.search(r"^\| Decode \(token\) +\| 2 +\| [\d.]+ ms", shown, re.MULTILINE)


def test_what_does_not_fit_the_model_is_refused(embedded_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.text_generation_benchmark(["-t", str(embedded_model), "-s", "9000"]) == 1
    assert "A prompt and its answer are 9008 tokens, but the model serves" in capsys.readouterr().err
