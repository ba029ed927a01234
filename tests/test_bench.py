"""The load generator: parsing of streams, and computation of its figures."""

import asyncio
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import first, settle
from bench.peers import __main__ as peers
from bench.peers import plot, tables
from bench.peers.servers import split_command
from tokenmill.bench.client import Answer, Ask, complete
from tokenmill.bench.load import disturbed, report, run_disturbed

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(text):
    return b"data: " + json.dumps({"choices": [{"text": text}]}).encode() + b"\n\n"


USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 4}}\n\n'


def with_server(pieces, use, forever=False):
    """Return the result of `use(base URL)` for a server that sends `pieces` with a pause after each."""

    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        while True:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.02)
            if not forever:
                break
            pieces[:] = [event("x")]
        writer.close()

    async def main():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            return await use(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")

    return asyncio.run(main())


def one(pieces):
    return with_server(pieces, lambda base: complete(base, Ask("a", 4)))


def test_a_model_that_is_given_is_the_one_that_servers_are_started_with(tmp_path, monkeypatch):
    model = tmp_path / "a model.gguf"
    model.touch()
    monkeypatch.setattr("sys.argv", ["peers", "--model", str(model), "--peers", "--server", "a=X=1 tokenmill serve"])
    options = peers._options()
    (server,) = peers._servers(options, Path(peers._source(options).path))
    assert split_command(server.command)[1][-2:] == ["--model-id", str(model)]
    monkeypatch.setattr("sys.argv", ["peers", "--model", str(tmp_path / "none.gguf")])
    with pytest.raises(SystemExit, match=r"none\.gguf is no file"):
        peers._source(peers._options())


def test_events_have_the_time_at_which_their_last_byte_came():
    first, second = event("ab"), event("cd")
    answer = one([HEAD, first + second[:9], second[9:], USAGE + b"data: [DONE]\n\n"])
    assert (answer.error, answer.text) == ("", "abcd")
    assert (answer.prompt_tokens, answer.completion_tokens) == (5, 4)
    assert answer.gaps_s[0] >= 0.015


def test_a_refusal_and_a_stream_that_breaks_off_are_errors():
    assert "429" in one([b"HTTP/1.1 429 Too Many Requests\r\n\r\n{}"]).error
    assert one([HEAD, event("ab")]).error
    assert one([]).error


def test_streams_are_cut_after_the_last_arrival():
    async def use(base):
        return await run_disturbed(base, [Ask("a", 4)] * 2, [], quiet_s=0.05)

    found = with_server([HEAD, event("a")], use, forever=True)
    assert (found.streams, found.arrivals) == (2, 0)


def test_decoding_is_counted_from_the_last_first_token():
    answers = [Answer(0.0, [1.0, 2.0, 3.0, 4.0], completion_tokens=8), Answer(0.0, [2.0, 3.0], completion_tokens=4)]
    found = report(answers, 4.0)
    assert found.tokens_per_s == 12 / 4
    assert found.decode_tokens_per_s == 3 * 2 / 2  # three chunks of two tokens after 2.0, until 4.0
    assert found.ttft_p50_s == 1.5


def test_gaps_count_as_disturbed_while_an_arrival_waits():
    stream = Answer(0.0, [0.0, 1.0, 2.0, 6.0, 7.0, 8.0])
    found = disturbed([stream], [Answer(2.5, [6.5], prompt_tokens=9)])
    assert (found.quiet_p99_s, found.gaps_p99_s, found.errors) == (1.0, 4.0, 0)
    early = disturbed([Answer(0.0, [0.0, 1.0])], [Answer(2.5, [6.5])])
    assert early.errors == 1


RECORD = {
    "servers": ["ours=tokenmill serve"], "date": "2026-11-22", "cpu": "a CPU", "cpus": 2,
    "rows": [
        {"row": "streams 1", "server": "peer", "pass": 1, "figures": {"decode_tokens_per_s": 100.0}},
        {"row": "streams 1", "server": "ours", "pass": 1, "figures": {"decode_tokens_per_s": 250.0}},
        {"row": "streams 1", "server": "ours", "pass": 2, "figures": {"decode_tokens_per_s": 300.0}},
        {"row": "streams 1", "server": "peer", "pass": 2, "figures": {"decode_tokens_per_s": 200.0}},
    ],
}  # fmt: skip


def test_ratios_are_of_one_pass_and_tables_show_the_best():
    assert tables.ratio(RECORD, "streams 1", "ours", "peer") == [2.5, 1.5]
    assert tables.summary(RECORD).endswith("| streams 1 | 300 | 200 |")
    text = tables.document(RECORD)
    assert "| ours | 300 |" in text
    assert "| peer | 200 |" in text


def test_the_plot_is_made_of_the_record():
    drawn = plot.svg(RECORD)
    assert drawn.startswith("<svg")
    assert ">300<" in drawn


def test_a_command_may_begin_with_variables():
    variables, words = split_command("TOKENMILL_ISA=avx2 tokenmill serve --port 1")
    assert variables == {"TOKENMILL_ISA": "avx2"}
    assert words[-4:] == ["tokenmill", "serve", "--port", "1"]


@pytest.mark.parametrize("values", [[], [math.nan]])
def test_no_answers_make_no_figures(values):
    assert math.isnan(report([Answer(0.0, error="x") for _ in values], 1.0).ttft_p50_s)


class Worked:
    """A server with scripted CPU time, and a clock. `busy`: true at seconds since the first call at which it works."""

    def __init__(self, busy: Callable[[float], bool]) -> None:
        self.now, self.cpu, self.busy = 0.0, 5.0, busy

    def sleep(self, seconds: float) -> None:
        self.cpu += seconds * 0.9 if self.busy(self.now) else seconds * 0.001
        self.now += seconds


@pytest.mark.parametrize(
    "busy, waited, cpu",
    [
        (lambda now: False, 6.0, 0.0),
        (lambda now: 3 <= now < 4 or 5 <= now < 6, 12.0, 1.8),  # pieces with pauses
        (lambda now: True, 60.0, 54.0),  # a server that never rests is not waited for
    ],
)
def test_a_server_is_settled_when_it_has_done_nothing_for_a_while(
    busy: Callable[[float], bool], waited: float, cpu: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Worked(busy)
    monkeypatch.setattr(settle, "time", SimpleNamespace(monotonic=lambda: server.now, sleep=server.sleep))
    monkeypatch.setattr(settle, "_cpu_s", lambda pid: server.cpu)
    assert settle.settle(1) == pytest.approx(cpu, abs=0.05)
    assert server.now == waited


def test_a_first_answer_is_judged_by_its_ratio_to_the_later_ones_of_its_start() -> None:
    def figures(tokens_per_s: float, p99: float) -> dict[str, float]:
        return {"tokens_per_s": tokens_per_s, "itl_p50_s": 0.01, "itl_p99_s": p99, "gap_s": 0.02, "ttft_s": 0.03}

    starts = [
        {"first": figures(50, 0.02), "later": [figures(100, 0.01)] * 3},
        {"first": figures(96, 0.011), "later": [figures(n, 0.01) for n in (10, 100, 500)]},
        {"first": figures(288, 0.011), "later": [figures(300, 0.01)]},
    ]
    table = first._table("ours", "text", starts)
    assert "| tok/s | 96 | 100 | 0.96 (goal met: within 15 %) |" in table
    starts[1]["first"] = figures(80, 0.02)
    table = first._table("ours", "text", starts)
    assert "| tok/s | 80 | 100 | 0.80 (goal missed: within 15 %) |" in table
    assert "| p99 ms | 20.0 | 10.0 | 2.00 (goal missed: within 15 %) |" in table
    assert "goal" not in first._table("ours", "schema", starts)
