"""Measure the host time of a step, without a device: schedule, record the tokens, encode the frame for one HTTP worker.

    python bench/scheduler.py [--sequences 256] [--steps 2000]

Three loads: steady (no sequence joins, ends or needs a block), decode (one row in sixteen needs a new block in each
step) and churn (in each step, one sequence in a hundred ends and another one replaces it).
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from statistics import median

import msgspec

from tokenmill.backends.base import StepResult
from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.scheduler import Scheduler, SchedulerLimits
from tokenmill.wire.channel import frame
from tokenmill.wire.messages import Request, SamplingParams, StepOutputs, StoppingParams

PROMPT_TOKENS = 200


def request(request_id: int, max_new_tokens: int) -> Request:
    prompt = tuple((request_id * 31 + i) % 30_000 for i in range(PROMPT_TOKENS + request_id % 16))
    return Request(request_id, prompt, SamplingParams(), StoppingParams(max_new_tokens, stop_ids=(2,)))


class Load:
    """Scheduler with a queue that is never empty and one step on the device. `longest`: limit of a sequence, tokens."""

    def __init__(self, sequences: int, block_size: int, longest: int, new_tokens: Callable[[int], int]) -> None:
        limits = SchedulerLimits(8192, sequences, longest, block_size)
        self.scheduler = Scheduler(BlockPool(sequences * (longest // block_size + 2) * 8 // 7, block_size), limits)
        self.new_tokens = new_tokens
        self.next_id = 0
        self.encoder = msgspec.msgpack.Encoder()
        for _ in range(sequences + 8):
            self.join()
        self.flying = self.scheduler.schedule()

    def join(self) -> None:
        """Queue one more request."""
        self.scheduler.add(request(self.next_id, self.new_tokens(self.next_id)))
        self.next_id += 1

    def step(self) -> tuple[float, float, float]:
        """Run one step; return the seconds of schedule, update and encoding."""
        scheduler = self.scheduler
        t0 = time.perf_counter()
        batch = scheduler.schedule()
        notices = scheduler.notices()
        t1 = time.perf_counter()
        done = self.flying
        assert done is not None
        result = StepResult([7] * len(done.samples))
        t2 = time.perf_counter()
        outputs = notices + scheduler.update(done, result)
        t3 = time.perf_counter()
        frame(self.encoder, StepOutputs(tuple(outputs), scheduler.stats(done, 0.0)))
        t4 = time.perf_counter()
        self.flying = batch
        for output in outputs:
            if output.finish_reason:
                self.join()
        return t1 - t0, t3 - t2, t4 - t3


def measure(name: str, load: Load, steps: int) -> None:
    for _ in range(50):
        load.step()
    gc.collect()
    times = [load.step() for _ in range(steps)]
    total = [sum(parts) * 1e3 for parts in times]
    schedule, update, encode = (median(parts) * 1e3 for parts in zip(*times, strict=True))
    p99 = sorted(total)[len(total) * 99 // 100]
    print(
        f"{name:7} {len(load.scheduler.running):4} running: {median(total):.3f} ms a step "
        f"(schedule {schedule:.3f}, update {update:.3f}, encode {encode:.3f}), p99 {p99:.3f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    n, steps = options.sequences, options.steps
    longest = steps + 400
    measure("steady", Load(n, longest, longest, lambda i: longest - PROMPT_TOKENS - 16), steps)
    measure("decode", Load(n, 16, longest, lambda i: longest - PROMPT_TOKENS - 16), steps)
    measure("churn", Load(n, 16, longest, lambda i: 50 + i * 7919 % 100), steps)


if __name__ == "__main__":
    main()
