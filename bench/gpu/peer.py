"""Measure vLLM without HTTP, with the workloads of `bench.gpu.offline`. Runs with vLLM's packages, not this project's.

    PYTHONPATH=FOLDER_OF_VLLM:. python -m bench.gpu.peer --shape 8b --only b,c,a

Random weights, token ids in and out, no prefix cache.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from typing import Any

from bench.gpu.longprompt import LongPrompt, measure
from bench.gpu.servers import PEER_ENVIRONMENT
from bench.gpu.shapes import SHAPES, crowd
from bench.gpu.tell import Turn, figure, tell

_STARTED = time.perf_counter()
_LONG_TOTAL = 36864


class Peer:
    """vLLM engine with the workloads (a), (b) and (c)."""

    def __init__(self, args: argparse.Namespace, folder: str) -> None:
        import vllm

        imported = time.perf_counter()
        self.shape, self.longest = args.shape, args.longest
        self.random, self._params = random.Random(1), vllm.SamplingParams
        self.llm = vllm.LLM(
            model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", seed=0,
            gpu_memory_utilization=0.85, enable_prefix_caching=False, generation_config="vllm",
            max_model_len=_LONG_TOTAL if "d" in args.only else 4096, max_num_seqs=256,
        )  # fmt: skip
        ready = time.perf_counter()
        tell(bench="start", shape=self.shape, import_s=round(imported - _STARTED, 1),
             load_s=round(ready - imported, 1), version=vllm.__version__)  # fmt: skip
        figure(self.shape, "ready without HTTP", round(ready - _STARTED, 1), "s")

    def prompts(self, count: int, length: int) -> list[list[int]]:
        return [[self.random.randint(0, 10000) for _ in range(length)] for _ in range(count)]

    def run(self, prompts: list[list[int]], counts: list[int], temperature: float = 0.0) -> float:
        """Run requests to their end and return the seconds."""
        params = [
            self._params(temperature=temperature, ignore_eos=True, max_tokens=n, min_tokens=n, detokenize=False)
            for n in counts
        ]
        start = time.perf_counter()
        found = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert sum(len(one.outputs[0].token_ids) for one in found) == sum(counts)
        return seconds

    def warm_up(self) -> None:
        """Run every kind of step once."""
        start = time.perf_counter()
        self.run(self.prompts(16, 512), [16] * 16)
        self.run(self.prompts(256, 64), [16] * 256, 0.6)
        self.run(self.prompts(8, 2048), [1] * 8)
        tell(bench="warm-up", shape=self.shape, seconds=round(time.perf_counter() - start, 1))

    def decode(self, batches: list[int]) -> None:
        """(b) Measure ms per step: (time of 128 tokens − time of one) / 127, the median of three."""
        for rows in batches:
            ms = []
            for _ in range(3):
                few = self.run(self.prompts(rows, 512), [1] * rows)
                ms.append((self.run(self.prompts(rows, 512), [128] * rows) - few) / 127 * 1e3)
            middle = round(statistics.median(ms), 3)
            figure(self.shape, f"decode, batch {rows}", middle, "ms", runs=[round(m, 3) for m in ms])

    def prefill(self) -> None:
        """(c) Measure prompt tokens per second: the median of 5 runs of 8 × 2048 tokens."""
        rates = [round(8 * 2048 / self.run(self.prompts(8, 2048), [1] * 8)) for _ in range(5)]
        figure(self.shape, "prefill", statistics.median(rates), "tok/s", runs=rates)

    def crowd(self, requests: int, repeat: int) -> None:
        """(a) Measure output tokens per second: the median of `repeat` runs."""
        work = crowd(requests, min(100, self.longest), self.longest)
        rates = [round(sum(work.counts) / self.run(work.prompts, work.counts, 0.6)) for _ in range(repeat)]
        name = f"crowd of {requests}" + (f", up to {self.longest}" if self.longest != 1024 else "")
        figure(self.shape, name, statistics.median(rates), "tok/s", runs=rates)


class Steps:
    """Implementation of `longprompt.Steps` for a vLLM engine."""

    def __init__(self, llm: Any, params: Any) -> None:
        from vllm.sampling_params import RequestOutputKind

        self._engine, self._params, self._kind = llm.llm_engine, params, RequestOutputKind.DELTA
        self._counts: list[int] = []
        self._names: dict[str, int] = {}

    def submit(self, prompt: list[int], max_tokens: int) -> int:
        number = len(self._counts)
        params = self._params(temperature=0.0, ignore_eos=True, max_tokens=max_tokens, detokenize=False,
                              output_kind=self._kind)  # fmt: skip
        self._counts.append(0)
        self._names[str(number)] = number
        self._engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
        return number

    def step(self) -> None:
        for output in self._engine.step():
            self._counts[self._names[output.request_id]] += len(output.outputs[0].token_ids)

    def tokens(self, request: int) -> int:
        return self._counts[request]

    def abort(self, request: int) -> None:
        self._engine.abort_request([str(request)])


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--only", default="b,c,a", help="of a,b,c,d")
    parser.add_argument("--batches", default="1,8,32,64,128,256")
    parser.add_argument("--streams", default="256", help="requests of (a), as 64,256")
    parser.add_argument("--longest", type=int, default=1024, help="tokens in and out of (a) at most")
    parser.add_argument("--repeat", type=int, default=3, help="rounds of (a); the median is told")
    parser.add_argument("--long-prompt", type=int, default=32768, help="tokens of (d)'s prompt")
    parser.add_argument("--long-streams", type=int, default=32)
    parser.add_argument("--wait", action="store_true", help="ask for each timed part on standard output")
    args = parser.parse_args(words)
    for name, value in PEER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as out:
            json.dump(SHAPES[args.shape], out)
        peer = Peer(args, folder)
        peer.warm_up()
        with Turn(args.wait):
            if "b" in args.only:
                peer.decode([int(n) for n in args.batches.split(",")])
            if "c" in args.only:
                peer.prefill()
            if "a" in args.only:
                for requests in args.streams.split(","):
                    peer.crowd(int(requests), args.repeat)
            if "d" in args.only:
                measure(Steps(peer.llm, peer._params), args.shape, LongPrompt(args.long_prompt, args.long_streams))


if __name__ == "__main__":
    main()
