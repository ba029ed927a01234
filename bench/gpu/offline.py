"""Measure this engine without HTTP: decode, prefill, a crowd, a long prompt while streams decode.

    python -m bench.gpu --shape 8b --only b,c,a            engine and scheduler included, tokens in and out
    python -m bench.gpu --shape 1b --only b --profile F    kernels of decode steps, to a file

(a) --streams requests of 100–1024 tokens in and out; (b) decode after 512-token prompts; (c) prefill of 8 × 2048
tokens; (d) 32 streams while a prompt of 32,768 tokens is computed.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time

import numpy as np
import torch

from bench.gpu.engine import Built, Setup
from bench.gpu.floor import decode_ms, share_of_peak
from bench.gpu.longprompt import LongPrompt, measure
from bench.gpu.quantized import KINDS, bits_of
from bench.gpu.shapes import H200_GOALS, H200_REFERENCES, SHAPES, crowd, unshared
from bench.gpu.tell import Turn, figure, tell
from tokenmill.backends.cuda.sizes import Sizes
from tokenmill.models.base import program_of
from tokenmill.program import ops
from tokenmill.runtime.offline import OfflineEngine
from tokenmill.wire.messages import SamplingParams, StoppingParams

_LONG_TOTAL = 36864  # tokens of a sequence that (d) needs


class Bench:
    """Engine with the workloads (a), (b) and (c)."""

    def __init__(self, built: Built, rows: list[int], prompt_tokens: int = 512) -> None:
        self.built, self.rows, self.prompt_tokens = built, rows, prompt_tokens
        self.shape, self.backend = built.setup.shape, built.backend
        self.timed, self.engine = built.timed, built.engine
        self.random, self.program = random.Random(0), program_of(built.setup.config())
        self.most_id = min(10000, built.setup.config()["vocab_size"] - 1)
        self.by_batch: dict[int, list[float]] = {}

    def prompt(self, length: int) -> list[int]:
        return [self.random.randint(0, self.most_id) for _ in range(length)]

    def run(self, prompts: list[list[int]], counts: list[int], temperature: float = 0.0) -> float:
        """Run requests to their end and return the seconds."""
        self.built.finish()
        self.timed.reset()
        start = time.perf_counter()
        for i, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
            self.engine.submit(prompt, SamplingParams(temperature=temperature, seed=i), StoppingParams(count))
        self.by_batch = {}
        before, running = time.perf_counter(), True
        while running:
            running = self.engine.step()
            now, stats = time.perf_counter(), self.engine.stats
            kind = -1 if stats.batch_tokens != stats.batch_size else -(-stats.batch_size // 32) * 32  # -1: prompts
            self.by_batch.setdefault(kind, []).append((now - before) * 1e3)
            before = now
        return time.perf_counter() - start

    def decode(self, repeat: int = 3) -> dict[int, float]:
        """(b) Measure ms per step by batch size, over the steps in which all rows decode."""
        found, size, beside = {}, self.prompt_tokens, self.built.beside
        self.built.set_beside(0)  # all prompts at once, so that all rows have the same context
        for rows in self.rows:
            ms, host, peer = [], [], []
            for _ in range(repeat):
                few = self.run([self.prompt(size) for _ in range(rows)], [1] * rows)
                many = self.run([self.prompt(size) for _ in range(rows)], [128] * rows)
                peer.append((many - few) / 127 * 1e3)
                ms.append(self.steady(rows))
                host.append(self.timed.seconds / self.timed.steps * 1e3)
            found[rows] = statistics.median(ms)
            device_ms, chosen = self.device(rows), self.chosen(rows)
            floor = decode_ms(self.program, rows, size + 114, chosen, *bits_of(self.built.setup.quantize))
            figure(self.shape, f"decode, batch {rows}", round(found[rows], 3), "ms", runs=[round(m, 3) for m in ms],
                   by_difference=round(statistics.median(peer), 3), launch_ms=round(statistics.median(host), 3),
                   device_ms=device_ms, floor_ms=round(floor, 3), of_floor=round(found[rows] / floor, 2),
                   experts_chosen=chosen)  # fmt: skip
        self.built.set_beside(beside)
        return found

    def steady(self, rows: int) -> float:
        """Return ms per step, over 100 steps with all rows about 64 tokens after their prompts."""
        ids = [
            self.engine.submit(self.prompt(self.prompt_tokens), SamplingParams(), StoppingParams(180))
            for _ in range(rows)
        ]
        while self.engine.stats.batch_tokens != rows or self.engine.stats.running < rows:
            self.engine.step()
        for _ in range(10):
            self.engine.step()
        self.timed.reset()
        start = time.perf_counter()
        for _ in range(100):
            self.engine.step()
        seconds = time.perf_counter() - start
        for i in ids:
            self.engine.abort(i)
        while self.engine.step():
            pass
        return seconds * 10

    def device(self, rows: int) -> float | None:
        """Return ms of a repeated captured step, 64 tokens after the prompt; None without CUDA graphs."""
        backend = self.backend
        if not self.built.real or not backend._graphs.padded(rows):
            return None
        sizes = self._step(rows)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for i in range(60):
            if i == 10:
                start.record()
            backend._graphs.replay(sizes.tokens, False)
        end.record()
        torch.cuda.synchronize()
        return round(float(start.elapsed_time(end)) / 50, 3)

    def chosen(self, rows: int) -> float | None:
        """Return the mean number of experts that the rows of a step choose in a layer; None without experts."""
        backend, counts = self.backend, []
        if not self.built.real or not any(isinstance(op, ops.Route) for op in backend.program.ops):
            return None
        sizes = self._step(rows)
        for launch in (*backend._body, *backend._tail):
            launch.run(sizes)
            if isinstance(launch.op, ops.Route):
                counts.append(len(backend._memory.value(launch.op.out)[:rows].unique()))
        return round(statistics.mean(counts), 1)

    def _step(self, rows: int) -> Sizes:
        """Send a decode step, padded to a captured size, of sequences 64 tokens after their prompts."""
        slots, backend = np.arange(rows, dtype=np.int32), self.backend
        tokens = self.prompt_tokens + 64
        blocks = -(-(tokens + 24) // backend.limits.block_size)
        for slot in range(rows):
            first = slot * blocks
            backend._slots.set_blocks(slot, np.arange(first, first + blocks, dtype=np.int32) % backend.num_blocks)
        sizes: Sizes = backend._arrays.decode(slots, np.full(rows, tokens, np.int32), backend._graphs.padded(rows))
        return sizes

    def prefill(self, length: int = 2048) -> None:
        """(c) Measure prompt tokens per second: the median over 8 prompts."""
        rates = []
        for n in (8, 8, 8, 32):
            seconds = self.run([self.prompt(length) for _ in range(n)], [1] * n)
            rates.append(round(n * length / seconds))
            tell(bench="prefill", shape=self.shape, prompts=n, tokens_s=rates[-1])
        share = share_of_peak(self.program, statistics.median(rates[:3]))
        figure(self.shape, "prefill", statistics.median(rates[:3]), "tok/s", runs=rates[:3], of_32_prompts=rates[3],
               of_peak=round(share, 3))  # fmt: skip

    def crowd(self, requests: int, longest: int, repeat: int) -> None:
        """(a) Measure output tokens per second: the median of `repeat` runs, then once with unlimited prompt chunks."""
        rates = [self._crowd(requests, longest, self.built.beside, seed) for seed in range(repeat)]
        name = f"crowd of {requests}" + (f", up to {longest}" if longest != 1024 else "")
        figure(self.shape, name, statistics.median(rates), "tok/s", runs=rates, beside=self.built.beside)
        if beside := self.built.beside:
            self.built.set_beside(0)
            rate = self._crowd(requests, longest, 0, repeat)
            self.built.set_beside(beside)
            figure(self.shape, f"{name}, prompts in whole steps", rate, "tok/s")

    def _crowd(self, requests: int, longest: int, beside: int, seed: int) -> int:
        work = crowd(requests, min(100, longest), longest, most_ids=self.most_id)
        prompts = unshared(work.prompts, seed, self.most_id)
        seconds, steps = self.run(prompts, work.counts, 0.6), self.by_batch
        rate = round(sum(work.counts) / seconds)
        tell(bench="crowd", shape=self.shape, requests=requests, beside=beside, tokens_s=rate,
             seconds=round(seconds, 2), steps=self.timed.steps,
             launch_ms=round(self.timed.seconds / self.timed.steps * 1e3, 3),
             ms_by_batch={n: (len(ms), round(statistics.mean(ms), 2)) for n, ms in sorted(steps.items())},
             slowest=[round(x, 1) for x in sorted(x for ms in steps.values() for x in ms)[-5:]])  # fmt: skip
        return rate

    def profile(self, path: str) -> None:
        """Write the kernels of decode steps to a file, by time."""
        from torch.profiler import ProfilerActivity, profile

        with open(path, "w", encoding="utf-8") as out:
            for rows in self.rows:
                self.run([self.prompt(512) for _ in range(rows)], [4] * rows)
                for _ in range(rows):
                    self.engine.submit(self.prompt(512), SamplingParams(), StoppingParams(60))
                while self.engine.stats.batch_tokens != rows or self.engine.stats.running < rows:
                    self.engine.step()
                with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
                    for _ in range(10):
                        self.engine.step()
                    torch.cuda.synchronize()
                while self.engine.step():
                    pass
                table = found.key_averages().table(sort_by="cuda_time_total", row_limit=24, max_name_column_width=80)
                out.write(f"batch {rows}, 10 steps\n{table}\n\n")


class Steps:
    """Implementation of `longprompt.Steps` for this engine."""

    def __init__(self, engine: OfflineEngine) -> None:
        self._engine = engine
        self._counts: dict[int, int] = {}

    def submit(self, prompt: list[int], max_tokens: int) -> int:
        request = self._engine.submit(prompt, SamplingParams(), StoppingParams(max_tokens))
        self._counts[request] = 0
        return request

    def step(self) -> None:
        if not self._engine.step():
            raise RuntimeError("the streams ended early: --max-total is too small")

    def tokens(self, request: int) -> int:
        self._counts[request] += sum(len(output.token_ids) for output in self._engine.poll(request))
        return self._counts[request]

    def abort(self, request: int) -> None:
        self._engine.abort(request)


def options() -> argparse.ArgumentParser:
    """Return the parser of this measurement's options."""
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--only", default="b,c,a", help="of a,b,c,d")
    parser.add_argument("--batches", default="1,8,32,64,128,256")
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=8192, help="of a step")
    parser.add_argument("--max-total", type=int, default=0, help="of a sequence; 0: what the workloads need")
    parser.add_argument("--beside", type=int, default=None, help="prompt tokens beside decoding; default: the server's")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3, help="rounds of (a); the median is told")
    parser.add_argument("--decode-repeat", type=int, default=3, help="rounds of (b); the median is told")
    parser.add_argument("--streams", default="256", help="requests of (a), as 64,256")
    parser.add_argument("--longest", type=int, default=1024, help="tokens in and out of (a) at most")
    parser.add_argument("--long-prompt", type=int, default=32768, help="tokens of (d)'s prompt")
    parser.add_argument("--long-streams", type=int, default=32)
    parser.add_argument("--kv-cache-dtype", default="")
    parser.add_argument("--attention", default="")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument(
        "--quantize",
        default="",
        help=f"random codes, {', '.join(KINDS)}, with -experts of experts alone; or a method of the server",
    )
    parser.add_argument("--device", default="cuda", help="cpu: to try the measurement")
    parser.add_argument("--profile", default="")
    parser.add_argument("--wait", action="store_true", help="ask for each timed part on standard output")
    return parser


def setup_of(args: argparse.Namespace) -> Setup:
    """Return the setup that the options define."""
    given = {name: getattr(args, name) for name in ("kv_cache_dtype", "attention", "deterministic")}
    total = args.max_total or (_LONG_TOTAL if "d" in args.only else 4096)
    size = max(int(n) for n in [*args.batches.split(","), *args.streams.split(","), args.long_streams + 1])
    return Setup(
        shape=args.shape, layers=args.layers, device=args.device, max_batch_tokens=args.tokens, max_batch_size=size,
        max_total_tokens=total, block_size=args.block_size, beside=args.beside,
        quantize=args.quantize, options={name: value for name, value in given.items() if value},
    )  # fmt: skip


def main(words: list[str] | None = None) -> None:
    args = options().parse_args(words)
    built = Built(setup_of(args))
    size = 512 if args.shape != "tiny" else 16
    bench, found = Bench(built, [int(n) for n in args.batches.split(",")], size), {}
    gc.collect()
    gc.freeze()  # as in the server
    with torch.inference_mode(), Turn(args.wait):
        if "b" in args.only:
            found = bench.decode(args.decode_repeat)
        if "c" in args.only:
            bench.prefill(size * 4)
        if "a" in args.only:
            for requests in args.streams.split(","):
                bench.crowd(int(requests), args.longest, args.repeat)
        if "d" in args.only:
            small = {} if built.real else {"context": 20, "stream_tokens": 200, "quiet_steps": 5, "repeat": 1}
            work = LongPrompt(args.long_prompt, args.long_streams, bench.most_id, **small)
            measure(Steps(bench.engine), args.shape, work)
        if args.profile:
            built.set_beside(0)
            bench.profile(args.profile)
    if found and not args.wait:
        _print(args.shape, found)


def _print(shape: str, found: dict[int, float]) -> None:
    references = [H200_REFERENCES[name].get(shape, {}) for name in H200_REFERENCES]
    goals = H200_GOALS.get(shape, {})
    print(f"{shape}: batch, ms; of an H200: goal, {', '.join(H200_REFERENCES)}")
    for rows, ms in found.items():
        name = f"decode, batch {rows}"
        told = [goals[name].value if name in goals else 0.0, *(table.get(name, 0.0) for table in references)]
        print(f"{rows:5} {ms:7.3f} " + " ".join(f"{t:7.3f}" for t in told), flush=True)


if __name__ == "__main__":
    main()
