"""What the CUDA backend does on one card: decode, prefill, a mixed crowd, and the time to be ready; random weights.

    python -m bench.gpu --shape 8b --only b,c,a            engine and scheduler included, tokens in and out
    python -m bench.gpu --shape 1b --only b --profile F    kernels of decode steps, to a file

One JSON line a figure; a table last. Workloads as in docs/performance.md: (a) 256 requests of 100–1024 tokens in and
out, (b) decode behind 512-token prompts, (c) prefill of 8 × 2048 tokens.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from tokenmill.backends.base import Step, StepInputs, StepLimits
from tokenmill.backends.cuda.backend import CudaBackend
from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.scheduler import Scheduler, SchedulerLimits
from tokenmill.models.base import program_of
from tokenmill.parallel.group import Group
from tokenmill.program.cost import weights_of
from tokenmill.quant.none import read
from tokenmill.runtime.assembly import Assembled
from tokenmill.runtime.executor import Executor
from tokenmill.runtime.offline import OfflineEngine
from tokenmill.weights.checkpoint import Stored
from tokenmill.wire.messages import EngineInfo, SamplingParams, StoppingParams

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
}  # fmt: skip
SHAPES = {
    "8b": LLAMA_8B,
    "1b": LLAMA_8B | {"hidden_size": 2048, "num_hidden_layers": 16, "head_dim": 64, "intermediate_size": 8192,
                      "tie_word_embeddings": True},
}  # fmt: skip
STUDY = {
    "8b": {1: 3.87, 8: 4.36, 32: 4.83, 64: 5.55, 128: 7.24, 256: 11.73},
    "1b": {1: 0.851, 8: 0.928, 32: 1.125, 64: 1.287, 128: 1.711, 256: 2.634},
}
GOALS = {
    "8b": {1: 3.95, 8: 4.45, 32: 4.9, 64: 5.65, 128: 7.4, 256: 11.9},
    "1b": {1: 0.88, 8: 0.95, 32: 1.16, 64: 1.34, 128: 1.78, 256: 2.75},
}
PEER = {
    "8b": {1: 4.91, 8: 5.10, 32: 5.74, 64: 6.64, 128: 8.53, 256: 13.55},
    "1b": {1: 1.49, 8: 1.57, 32: 1.89, 64: 2.49, 128: 3.43, 256: 5.07},
}


class RandomWeights:
    """A checkpoint of any size: every tensor is a part of the same random numbers."""

    format = "safetensors"

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self._shapes: dict[str, tuple[int, ...]] = {}
        for weight in weights_of(program_of(config)):
            for part in weight.parts:
                self._shapes[part.name] = (part.rows, weight.columns) if weight.columns else (part.rows,)
        most = max(int(np.prod(shape)) for shape in self._shapes.values())
        drawn = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
        self._numbers = np.resize(drawn.view(torch.int16).numpy(), most + 4096)

    def names(self) -> Iterator[str]:
        return iter(self._shapes)

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self._shapes.get(name)

    def nbytes(self, name: str) -> int:
        return int(np.prod(self._shapes[name])) * 2

    def __getitem__(self, name: str) -> Stored:
        shape = self._shapes[name]
        first = hash(name) % 4096
        data = self._numbers[first : first + int(np.prod(shape))]
        return Stored(name, "BF16", shape, data.view(np.uint8).reshape(shape[0], -1))


class Timed:
    """A backend whose launches are timed."""

    def __init__(self, backend: CudaBackend) -> None:
        self.backend, self.seconds, self.steps = backend, 0.0, 0

    def run(self, inputs: StepInputs) -> Step:
        start = time.perf_counter()
        step = self.backend.run(inputs)
        self.seconds, self.steps = self.seconds + time.perf_counter() - start, self.steps + 1
        return step


def tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


class Bench:
    """An engine of a shape, and the workloads."""

    def __init__(self, args: argparse.Namespace) -> None:
        config = dict(SHAPES[args.shape])
        if args.layers:
            config["num_hidden_layers"] = args.layers
        self.shape, self.rows = args.shape, [int(n) for n in args.batches.split(",")]
        start = time.perf_counter()
        weights = RandomWeights(config)
        limits = StepLimits(args.tokens, 256, 4096, args.block_size)
        drawn = time.perf_counter()
        self.backend = CudaBackend(program_of(config), weights, read, limits, Group(), dtype="bfloat16", device="cuda")
        loaded = time.perf_counter()
        free, _ = torch.cuda.mem_get_info()
        blocks = min(int((free - (6 << 30)) // self.backend.block_bytes()), 256 * 4096 // args.block_size)
        self.backend.allocate(blocks)
        self.backend.warm_up()
        ready = time.perf_counter()
        tell(bench="start", shape=self.shape, weights_s=round(loaded - drawn, 2), warm_up_s=round(ready - loaded, 2),
             drawn_s=round(drawn - start, 2), blocks=blocks)  # fmt: skip
        self.timed = Timed(self.backend)
        beside = args.beside
        scheduler = Scheduler(
            BlockPool(blocks, args.block_size), SchedulerLimits(args.tokens, 256, 4096, args.block_size,
                                                                prefill_beside=beside)
        )  # fmt: skip
        info = EngineInfo("bench", "bfloat16", "cuda", "cuda", blocks, args.block_size, 128256, 4095, 4096, 8192, 256)
        self.engine = OfflineEngine(Assembled(scheduler, Executor(self.timed, 256), info))  # type: ignore[arg-type]
        self.random = random.Random(0)

    def prompt(self, length: int) -> list[int]:
        return [self.random.randint(0, 10000) for _ in range(length)]

    def run(self, prompts: list[list[int]], counts: list[int], temperature: float = 0.0) -> float:
        """Seconds until all are done."""
        torch.cuda.synchronize()
        self.timed.seconds, self.timed.steps = 0.0, 0
        start = time.perf_counter()
        for i, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
            self.engine.submit(prompt, SamplingParams(temperature=temperature, seed=i), StoppingParams(count))
        self.by_batch: dict[int, list[float]] = {}
        before, running = time.perf_counter(), True
        while running:
            running = self.engine.step()
            now, stats = time.perf_counter(), self.engine.stats
            kind = -1 if stats.batch_tokens != stats.batch_size else -(-stats.batch_size // 32) * 32  # -1: prompts
            self.by_batch.setdefault(kind, []).append((now - before) * 1e3)
            before = now
        return time.perf_counter() - start

    def decode(self) -> dict[int, float]:
        """(b) ms a step, by batch size: over the steps in which all rows decode."""
        found = {}
        for rows in self.rows:
            ms, host, peer = [], [], []
            for _ in range(3):
                few = self.run([self.prompt(512) for _ in range(rows)], [1] * rows)
                many = self.run([self.prompt(512) for _ in range(rows)], [128] * rows)
                peer.append((many - few) / 127 * 1e3)
                ms.append(self.steady(rows))
                host.append(self.timed.seconds / self.timed.steps * 1e3)
            found[rows] = statistics.median(ms)
            tell(bench="decode", shape=self.shape, batch=rows, ms=round(found[rows], 3), runs=[round(m, 3) for m in ms],
                 by_difference=round(statistics.median(peer), 3), launch_ms=round(statistics.median(host), 3),
                 device_ms=round(self.device(rows), 3))  # fmt: skip
        return found

    def steady(self, rows: int) -> float:
        """ms a step of 100 steps with all rows at about 576 tokens."""
        ids = [self.engine.submit(self.prompt(512), SamplingParams(), StoppingParams(180)) for _ in range(rows)]
        while self.engine.stats.batch_tokens != rows or self.engine.stats.running < rows:
            self.engine.step()
        for _ in range(10):
            self.engine.step()
        self.timed.seconds, self.timed.steps = 0.0, 0
        start = time.perf_counter()
        for _ in range(100):
            self.engine.step()
        seconds = time.perf_counter() - start
        for i in ids:
            self.engine.abort(i)
        while self.engine.step():
            pass
        return seconds * 10

    def device(self, rows: int) -> float:
        """ms of a captured step alone, at 576 tokens a row, over and over."""
        slots, backend = np.arange(rows, dtype=np.int32), self.backend
        blocks = -(-600 // backend.limits.block_size)
        for slot in range(rows):
            first = slot * blocks
            backend._slots.set_blocks(slot, np.arange(first, first + blocks, dtype=np.int32) % backend.num_blocks)
        sizes = backend._sizes_of_decode(slots, np.full(rows, 576, np.int32), backend._graphs.padded(rows))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for i in range(60):
            if i == 10:
                start.record()
            backend._graphs.replay(sizes.tokens, False)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 50

    def prefill(self) -> None:
        """(c) prompt tokens a second."""
        for n in (8, 8, 8, 32):
            seconds = self.run([self.prompt(2048) for _ in range(n)], [1] * n)
            tell(bench="prefill", shape=self.shape, prompts=n, tokens_s=round(n * 2048 / seconds))

    def crowd(self, repeats: int) -> None:
        """(a) output tokens a second."""
        for _ in range(repeats):
            r = random.Random(0)
            prompts = [[r.randint(0, 10000) for _ in range(r.randint(100, 1024))] for _ in range(256)]
            for i, prompt in enumerate(prompts):  # no prompt twice: the prefix cache would find it
                prompt[0] = self.random.randint(0, 1 << 16) + i
            counts = [r.randint(100, 1024) for _ in range(256)]
            seconds, steps = self.run(prompts, counts, 0.6), self.by_batch
            tell(bench="crowd", shape=self.shape, tokens_s=round(sum(counts) / seconds), seconds=round(seconds, 2),
                 steps=self.timed.steps, launch_ms=round(self.timed.seconds / self.timed.steps * 1e3, 3),
                 ms_by_batch={n: (len(ms), round(statistics.mean(ms), 2)) for n, ms in sorted(steps.items())},
                 slowest=[round(x, 1) for x in sorted(x for ms in steps.values() for x in ms)[-5:]])  # fmt: skip

    def profile(self, path: str) -> None:
        """Kernels of decode steps, by time."""
        from torch.profiler import ProfilerActivity, profile

        with open(path, "w", encoding="utf-8") as out:
            for rows in self.rows:
                self.run([self.prompt(512) for _ in range(rows)], [4] * rows)
                for _ in range(rows):
                    self.engine.submit(self.prompt(512), SamplingParams(), StoppingParams(60))
                for _ in range(rows * 512 // self.backend.limits.max_batch_tokens + 12):
                    self.engine.step()
                with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
                    for _ in range(10):
                        self.engine.step()
                    torch.cuda.synchronize()
                while self.engine.step():
                    pass
                table = found.key_averages().table(sort_by="cuda_time_total", row_limit=24, max_name_column_width=80)
                out.write(f"batch {rows}, 10 steps\n{table}\n\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--only", default="b,c,a")
    parser.add_argument("--batches", default="1,8,32,64,128,256")
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--beside", type=int, default=0)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--profile", default="")
    args = parser.parse_args()
    bench, found = Bench(args), {}
    gc.collect()
    gc.freeze()  # as a server does
    with torch.inference_mode():
        if "b" in args.only:
            found = bench.decode()
        if "c" in args.only:
            bench.prefill()
        if "a" in args.only:
            bench.crowd(args.repeat)
        if args.profile:
            bench.profile(args.profile)
    print(f"{args.shape}: batch, ms, goal, study, vLLM")
    for rows, ms in found.items():
        told = (table[args.shape].get(rows, 0.0) for table in (GOALS, STUDY, PEER))
        print(f"{rows:5} {ms:7.3f} " + " ".join(f"{t:7.3f}" for t in told), flush=True)


if __name__ == "__main__":
    main()
