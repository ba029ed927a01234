"""The benchmark of GPU machines, as far as it runs without a GPU: files, clients, servers, the plan and its table."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from support_cpu import CpuDriver  # noqa: E402
from support_ports import unused_port  # noqa: E402
from support_server import ROOT, Server  # noqa: E402

from bench.gpu import offline, serving, table  # noqa: E402
from bench.gpu.checkpoint import write_checkpoint  # noqa: E402
from bench.gpu.plan import LIMITS, Plan  # noqa: E402
from bench.gpu.plan import options as plan_options  # noqa: E402
from bench.gpu.runner import Host, Part, Record, Runner  # noqa: E402
from bench.gpu.shapes import SHAPES, crowd, unshared  # noqa: E402
from bench.gpu.tokenizer import MARK  # noqa: E402
from tokenmill.bench.client import Answer, Ask  # noqa: E402
from tokenmill.bench.crowd import Found, fold, run_crowd, token_gaps  # noqa: E402
from tokenmill.errors import Unsupported  # noqa: E402

TINY = SHAPES["tiny"]
MOCK = (
    "{python} -m tokenmill serve --mock --mock-step-ms 1 --model-id {model} --hostname 127.0.0.1 --port {port} "
    "--http-workers {workers} --max-batch-size {streams} --max-concurrent-requests {room} --max-total-tokens {total}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a checkpoint of the tiny shape."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    assert write_checkpoint(path, TINY)
    return path


def told(capsys):
    """Return the figures printed as JSON, by name."""
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    return {line["figure"]: line for line in lines if "figure" in line}, lines


# ---- the checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_the_cpu_backend_and_transformers_compute_the_same_from_a_made_checkpoint(tmp_path, tied):
    from transformers import AutoModelForCausalLM

    write_checkpoint(tmp_path, TINY | {"tie_word_embeddings": tied}, shard_bytes=100_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    prompt = np.random.default_rng(0).integers(0, 1792, 40).tolist()
    with torch.no_grad():
        wanted = model(torch.tensor([prompt])).logits[0, -1].numpy()
    with contextlib.closing(CpuDriver.of(tmp_path)) as driver:
        found = driver.feed([(0, prompt)])[0]
    assert wanted.std() > 0.01
    np.testing.assert_allclose(found, wanted, rtol=2e-2, atol=2e-2 * wanted.std())


def test_a_checkpoint_that_is_there_is_not_written_again_but_one_in_part_is(tmp_path):
    assert write_checkpoint(tmp_path, TINY)
    assert not write_checkpoint(tmp_path, TINY)
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    assert write_checkpoint(tmp_path, TINY)
    assert not write_checkpoint(tmp_path, TINY)
    assert write_checkpoint(tmp_path, TINY | {"num_hidden_layers": 1})


def test_the_made_tokenizer_has_exactly_the_models_ids_and_its_words_one_mark_each(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == TINY["vocab_size"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (TINY["bos_token_id"], TINY["eos_token_id"])
    words = [tokenizer.decode([i]) for i in range(256, TINY["bos_token_id"])]
    assert all(word.count(MARK) == 1 for word in words)
    assert len(set(words)) == len(words)
    ids = list(range(300, 400))
    assert tokenizer(tokenizer.decode(ids), add_special_tokens=False).input_ids == ids


# ---- the clients


def test_an_events_tokens_came_together():
    answer = Answer(0.0, [1.0, 2.0, 4.0], [" a", " b c d", " e"], completion_tokens=5)
    assert token_gaps(answer, " ") == [1.0, 0.0, 0.0, 2.0]
    assert sorted(token_gaps(answer, "")) == [0.0, 0.0, 1.0, 2.0]


def test_failed_streams_are_errors_and_nothing_else():
    good = Answer(10.0, [11.0, 12.0], [" a", " b"], completion_tokens=2)
    found = fold([Found([good, Answer(10.0, error="refused")], 1.5), Found([good], 0.5)], 10.0)
    assert (found.streams, found.errors, found.first_error) == (3, 1, "refused")
    assert (found.tokens, found.wall_s, found.tokens_per_s, found.client_busy) == (4, 2.0, 2.0, 0.75)


@pytest.mark.slow
def test_processes_count_all_events_and_tokens_of_a_server(folder):
    options = ("--mock-step-ms", "1", "--mock-text", " as be", "--max-batch-size", "64")
    server = Server(folder, unused_port(), *options)
    try:
        asks = [Ask([i, 1, 2], 20 + i % 3, temperature=0.6) for i in range(20)]
        found = run_crowd(server.url, asks, clients=3, mark=MARK)
    finally:
        server.stop()
    assert (found.streams, found.clients, found.errors) == (20, 3, 0)
    assert found.tokens == sum(ask.new_tokens for ask in asks)
    assert 20 <= found.events <= found.tokens
    assert found.wall_s > 0.02  # 22 steps of a millisecond
    assert found.itl_p50_s < found.itl_p99_s < found.wall_s
    gone = run_crowd(server.url, asks[:2], clients=2, timeout_s=5)
    assert gone.errors == 2
    assert "Connect" in gone.first_error


# ---- the workloads


def test_workloads_are_always_the_same_and_share_no_prefix_between_rounds():
    work = crowd(256)
    assert (sum(map(len, work.prompts)), sum(work.counts)) == (142827, 133966)
    firsts = [prompt[0] for seed in (1, 2) for prompt in unshared(work.prompts, seed)]
    assert len(set(firsts[:256])) == 256
    assert [len(p) for p in unshared(work.prompts, 1)] == [len(p) for p in work.prompts]


@pytest.mark.slow
def test_every_offline_workload_gives_its_figures(capsys):
    offline.main(
        "--shape tiny --device cpu --only b,c,a,d --batches 1,2 --streams 3 --longest 24 --tokens 128 --repeat 1 "
        "--decode-repeat 1 --long-prompt 300 --long-streams 2".split()
    )
    figures, lines = told(capsys)
    assert {"decode, batch 1", "decode, batch 2", "prefill", "crowd of 3, up to 24",
            "long prompt: p99 to quiet p99", "long prompt: first token"} <= figures.keys()  # fmt: skip
    assert all(line["value"] > 0 for line in figures.values())
    runs = [line for line in lines if line.get("bench") == "crowd"]
    assert [run["beside"] > 0 for run in runs] == [True, False]
    quiet, busy = figures["long prompt: quiet p50"]["value"], figures["long prompt: p50 meanwhile"]["value"]
    assert busy > quiet


FAKE_VLLM = """
import time
from types import SimpleNamespace as Some

__version__ = "fake"


class SamplingParams:
    def __init__(self, **fields):
        self.__dict__.update(fields)


class Engine:
    def __init__(self):
        self.running = {}

    def add_request(self, name, prompt, params):
        assert params.output_kind == "delta"
        self.running[name] = len(prompt["prompt_token_ids"]) // 100

    def abort_request(self, names):
        for name in names:
            del self.running[name]

    def step(self):
        waits = [name for name, steps in self.running.items() if steps > 0]
        time.sleep(0.01 if waits else 0.001)
        self.running.update({name: self.running[name] - 1 for name in waits})
        return [Some(request_id=n, outputs=[Some(token_ids=[7])]) for n, steps in self.running.items() if steps <= 0]


class LLM:
    def __init__(self, model, load_format, **fields):
        assert load_format == "dummy"
        self.llm_engine = Engine()

    def generate(self, prompts, params, use_tqdm):
        time.sleep(0.002 * max(one.max_tokens for one in params))
        return [Some(outputs=[Some(token_ids=[7] * one.max_tokens)]) for one in params]
"""


@pytest.mark.slow
def test_the_peer_is_measured_by_the_same_names(tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(FAKE_VLLM)
    (tmp_path / "vllm" / "sampling_params.py").write_text("class RequestOutputKind:\n    DELTA = 'delta'\n")
    words = "--shape tiny --only b,c,a,d --batches 1,4 --streams 3 --longest 24 --long-prompt 2000 --long-streams 2"
    done = subprocess.run([sys.executable, "-m", "bench.gpu.peer", *words.split()], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(one) for one in done.stdout.splitlines()]
    figures = {one["figure"]: one["value"] for one in lines if "figure" in one}
    assert 1.9 < figures["decode, batch 4"] < 4
    assert {"prefill", "crowd of 3, up to 24", "long prompt: first token"} <= figures.keys()
    assert figures["long prompt: p99 to quiet p99"] > 1.5


def test_options_reach_the_backend():
    with pytest.raises(Unsupported, match="int8"):
        offline.main("--shape tiny --device cpu --kv-cache-dtype int8".split())


@pytest.mark.slow
def test_a_server_is_started_twice_loaded_and_stopped(folder, tmp_path, capsys):
    words = ["--shape", "tiny", "--model", str(folder), "--streams", "3,9", "--longest", "40", "--http-workers", "1,2"]
    words += ["--clients", "2", "--repeat", "1", "--settle", "0", "--command", MOCK, "--log", str(tmp_path / "log")]
    serving.main(words)
    figures, lines = told(capsys)
    assert {"ready, kernels not cached", "ready, kernels cached", "HTTP, 3 streams", "HTTP, 9 streams",
            "HTTP, 9 streams, 2 workers"} <= figures.keys()  # fmt: skip
    assert figures["HTTP, 9 streams: errors"]["value"] == 0
    wanted = sum(crowd(9, 40, 40, most_ids=2000).counts)
    assert {line["tokens"] for line in lines if line.get("bench") == "HTTP, 9 streams"} == {wanted}
    assert figures["HTTP, 9 streams: CPU of engine"]["each"]


# ---- the plan


def part(name, code, limit_s=20.0, **more):
    return Part(name=name, who=more.pop("who", "ours"), shape="tiny", command=[sys.executable, "-c", code],
                limit_s=limit_s, environment={"PYTHONPATH": str(ROOT)}, **more)  # fmt: skip


FIGURE = "from bench.gpu.tell import figure; figure('tiny', {name!r}, 2.0, 'ms')"


def test_what_fails_or_hangs_is_reported_and_the_rest_runs(tmp_path):
    record = Record(tmp_path / "gpu.jsonl")
    runner = Runner(record, tmp_path, time.monotonic() + 60)
    runner.lane([
        part("dies", FIGURE.format(name="before") + "; print('a line'); raise ValueError('no card')"),
        part("hangs", "import time; time.sleep(60)", 0.5),
        part("needy", "raise SystemExit(0)", needs="dies"),
        part("works", FIGURE.format(name="after")),
    ], "")  # fmt: skip
    lines = table.read(tmp_path / "gpu.jsonl")
    failed = {line["part"]: line["failed"] for line in lines if "failed" in line}
    assert failed.keys() == {"dies", "hangs", "needy"}
    assert "ValueError: no card" in failed["dies"]
    assert "longer than" in failed["hangs"]
    assert "dies is not there" in failed["needy"]
    assert [line["figure"] for line in lines if "figure" in line] == ["before", "after"]
    assert "a line" in (tmp_path / "dies.log").read_text()
    text = table.table(lines)
    assert "failed: hangs" in text
    assert "after" in text


@pytest.mark.slow
def test_what_has_the_host_alone_is_not_timed_beside_anything(tmp_path):
    record = Record(tmp_path / "gpu.jsonl")
    runner = Runner(record, tmp_path, time.monotonic() + 60)
    code = (
        "import time; from bench.gpu.tell import Turn, tell\nwith Turn(True, alone={alone}):\n"
        "    start = time.monotonic(); time.sleep(0.3); tell(start=start, end=time.monotonic())"
    )
    lanes = [
        [part(f"{who}{i}", code.format(alone=(i + n) % 2 == 0), who=who) for i in range(3)]
        for n, who in enumerate(("ours", "peer"))
    ]
    threads = [threading.Thread(target=runner.lane, args=(lane, "")) for lane in lanes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spans = [(line["start"], line["end"], line["part"]) for line in record.lines if "start" in line]
    assert len(spans) == 6
    alone = {lane[i].name for n, lane in enumerate(lanes) for i in range(3) if (i + n) % 2 == 0}
    for a, b, name in spans:
        if name in alone:
            assert not [other for c, d, other in spans if other != name and c < b and d > a]


def test_several_share_the_host_and_a_turn_that_does_not_come_is_given_up():
    host = Host()
    assert host.enter(False, time.monotonic())
    assert host.enter(False, time.monotonic())
    assert not host.enter(True, time.monotonic() + 0.05)
    host.leave()
    host.leave()
    assert host.enter(True, time.monotonic())
    assert not host.enter(False, time.monotonic())


def test_a_plan_knows_its_parts_and_names_others(tmp_path):
    def parts(words):
        args = plan_options().parse_args([*words, "--work", str(tmp_path)])
        plan = Plan(args, tmp_path, tmp_path)
        return plan, plan.parts()

    plan, found = parts(["--parts", "tests,offline-8b,variants-1b,http-8b,peer-long-8b,peer-http-1b",
                         "--limit", "http-8b=7"])  # fmt: skip
    assert [p.name for p in found] == [
        "tests", "offline-8b", "variants-1b:fp8", "variants-1b:deterministic", "http-8b", "peer-long-8b", "peer-http-1b"
    ]  # fmt: skip
    assert [p.who for p in found[-3:]] == ["ours", "peer", "peer"]
    assert found[4].limit_s == 7
    assert found[2].limit_s == LIMITS["variants"]
    assert any("test_cuda" in word for word in found[0].command)
    assert [p.name for p in plan.checkpoints(found)] == ["checkpoint-8b", "checkpoint-1b"]
    with pytest.raises(SystemExit, match="offline-9b"):
        parts(["--parts", "offline-9b"])


# ---- the table


def line(name, value, unit="ms", *, who="ours", shape="8b", less=True, **more):
    return {"figure": name, "shape": shape, "who": who, "value": value, "unit": unit, "less": less, **more}


def cells(text, *words):
    """Return the cells of the row that contains all words."""
    (row,) = [row for row in text.splitlines() if row.startswith("|") and all(word in row for word in words)]
    return [cell.strip() for cell in row.strip("|").split("|")]


def machine(card):
    return {"machine": {"cards": [card], "driver": "1", "cpus": 2, "versions": {"torch": "2.11"}, "date": "today"}}


LINES = [
    line("decode, batch 1", 4.5), line("decode, batch 1", 4.0), line("decode, batch 1", 5.0, who="peer"),
    line("crowd of 256", 11000, "tok/s", less=False), line("crowd of 256", 10000, "tok/s", less=False, who="peer"),
    line("HTTP, 256 streams", 8800, "tok/s", less=False),
    line("crowd of 256", 12000, "tok/s", less=False, variant="fp8"),
    {"part": "http-8b", "failed": "exit code 1; no card"},
]  # fmt: skip


def test_a_table_has_the_last_values_ratios_shares_and_failures():
    text = table.table([machine("NVIDIA H100"), *LINES])
    assert "NVIDIA H100, driver 1, 2 CPUs, torch 2.11" in text
    assert cells(text, "decode, batch 1") == ["8b", "decode, batch 1, ms", "4.0", "5.0", "1.25", "", ""]
    assert cells(text, "8b  ", "crowd of 256")[2:] == ["11,000", "10,000", "1.10", "≥ 1.12 × peer", "no"]
    assert cells(text, "fp8", "crowd of 256")[2:5] == ["12,000", "10,000", "1.20"]
    assert cells(text, "of offline")[2] == "0.8"
    assert "failed: http-8b: exit code 1; no card" in text
    assert "study" not in text


def test_on_an_h200_its_own_goals_and_earlier_figures_are_shown():
    text = table.table([machine("NVIDIA H200"), *LINES])
    assert cells(text, "decode, batch 1")[5:] == ["≤ 3.95", "no", "3.87", "4.91"]
    assert cells(text, "8b  ", "crowd of 256")[5:7] == ["≥ 11,000", "yes"]


def test_a_table_is_printed_again_from_a_file(tmp_path, capsys, monkeypatch):
    from bench.gpu import plan

    path = tmp_path / "gpu.jsonl"
    path.write_text("\n".join(json.dumps(one) for one in [machine("NVIDIA H100"), *LINES]) + '\n{"cut o')
    plan.main(["--table", str(path)])
    assert re.search(r"decode, batch 1, ms +\| +4\.0 \| +5\.0 \| +1\.25", capsys.readouterr().out)
