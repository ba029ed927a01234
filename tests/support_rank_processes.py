"""Ranks as processes that share one GPU, and what they do in tests. Each process runs many tasks."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from support_cuda import CudaDriver, torch

from tokenmill.backends.base import StepLimits
from tokenmill.backends.cuda.backend import CudaBackend
from tokenmill.backends.cuda.collectives.base import Needs, Normed
from tokenmill.backends.cuda.collectives.choice import NEVER, Limits
from tokenmill.backends.cuda.collectives.ipc import IpcMemory
from tokenmill.backends.cuda.collectives.peers import Layout, Peers
from tokenmill.backends.cuda.encoded import EncoderDecoderBackend
from tokenmill.backends.cuda.sizes import Sizes
from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.scheduler import Scheduler, SchedulerLimits
from tokenmill.models.base import program_of
from tokenmill.parallel.group import Group
from tokenmill.program.encoded import encodes
from tokenmill.runtime.assembly import Assembled
from tokenmill.runtime.executor import Executor
from tokenmill.runtime.offline import OfflineEngine
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source
from tokenmill.wire.messages import EngineInfo, SamplingParams, StoppingParams

Steps = list[list[tuple[int, list[int]]]]


class Processes:
    """Processes of `size` ranks. `run` calls a function of this file in all, and returns their results.

    After a failure, new processes are started.
    """

    def __init__(self, size: int) -> None:
        self._size, self._pipes, self._processes = size, list[Any](), list[Any]()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        address = str(Path(self._folder.name) / "group.sock")
        for rank in range(self._size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._size, address, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, task: str, *arguments: Any, timeout_s: float = 120.0, **options: Any) -> list[Any]:
        if not self._pipes:
            self._start()
        for pipe in self._pipes:
            pipe.send((task, arguments, options))
        found = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(timeout_s):
                self.close()
                raise TimeoutError(f"rank {rank} did not answer {task}")
            ok, value = pipe.recv()
            if not ok:
                self.close()
                raise AssertionError(f"rank {rank}: {value}")
            found.append(value)
        return found

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        if self._pipes:
            self._folder.cleanup()
        self._pipes, self._processes = [], []


def _serve(rank: int, size: int, address: str, pipe: Any) -> None:
    group = Group.connect(rank, size, address, 60)
    while True:
        task, arguments, options = pipe.recv()
        try:
            pipe.send((True, globals()[task](group, *arguments, **options)))
        except BaseException:  # noqa: BLE001  the main process raises it
            pipe.send((False, traceback.format_exc()))


def peers_of(group: Group, needs: Needs, limits: Limits) -> tuple[Peers, IpcMemory]:
    layout = Layout.of(needs, group.size)
    memory = IpcMemory(group, layout.nbytes, torch.device("cuda:0"))
    return Peers(memory.shared, layout, limits, 60.0), memory


def drawn(seed: int, *shape: int, dtype: Any = torch.bfloat16) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def sums(group: Group, shapes: list[tuple[int, int]], dtype: str, one_shot: int) -> list[str]:
    """Return which sums over the ranks, of these shapes, are not those of torch."""
    kind, wrong = getattr(torch, dtype), []
    rows, row = max(n for n, _ in shapes), max(width for _, width in shapes)
    needs = Needs(rows, row * kind.itemsize, 4, 8, kind.itemsize)
    peers, memory = peers_of(group, needs, Limits(one_shot, NEVER))
    for number, (n, width) in enumerate(shapes):
        parts = [drawn(number * 10 + rank, n, width, dtype=kind) for rank in range(group.size)]
        out = torch.full((n, width), 9.0, device="cuda").to(kind)
        peers.reduction(parts[group.rank], out).run(n)
        wanted = sum((part.float() for part in parts[1:]), parts[0].float()).to(kind)
        torch.cuda.synchronize()
        peers.check()
        if not torch.equal(out, wanted):
            wrong.append(f"{n} x {width}: {(out.float() - wanted.float()).abs().max()}")
    group.exchange(b"")
    memory.close()
    return wrong


def replays(group: Group, rows: int, width: int, times: int) -> list[str]:
    """Return what is wrong after so many replays of a graph of a sum, a sum with a norm, and tokens of rank 0."""
    peers, memory = peers_of(group, Needs(rows, width * 2, rows, 8, 2), Limits(1 << 20, NEVER))
    x = torch.zeros(rows, width, device="cuda", dtype=torch.float16)
    total, normed, many, summed = (torch.zeros_like(x) for _ in range(4))
    weight, y = torch.ones(width, device="cuda", dtype=torch.float16), torch.zeros_like(x)
    one = peers.reduction(x, total, Normed(y, weight, None, total, normed, 1e-6, False))
    two = peers.reduction(many, summed)
    chosen = torch.zeros(rows, dtype=torch.int32, device="cuda")
    tokens = torch.zeros(rows, 8, dtype=torch.int32, device="cuda")
    pairs = torch.stack((torch.arange(rows), torch.zeros(rows)), 1).int().cuda().view(-1)
    spreading, sizes = peers.spreading(chosen, tokens), Sizes(rows, rows, pairs)

    def step() -> None:
        x.add_(group.rank + 1).remainder_(64)
        one.run_normed(rows)
        many.copy_(total)
        two.two_shots(rows)
        chosen.add_(1 if group.rank == 0 else 5)
        spreading.run(sizes, rows)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    wrong = []
    for i in range(times):
        graph.replay()
        if i % 100 == 99 or i < 3:
            torch.cuda.synchronize()
            peers.check()
            want = sum((i + 2) * (rank + 1) % 64 for rank in range(group.size))
            if not bool((total == want).all()) or not bool((summed == want * group.size).all()):
                wrong.append(f"replay {i}: {total.unique().tolist()} {summed.unique().tolist()}, not {want}")
            if chosen.unique().tolist() != [i + 2] or (group.rank and tokens[:, 1].unique().tolist() != [i + 2]):
                wrong.append(f"replay {i}: tokens {chosen.unique().tolist()} {tokens[:, 1].unique().tolist()}")
    group.exchange(b"")
    memory.close()
    return wrong


def gathers(group: Group, columns: int, width: int, rows: int) -> bool:
    """Return True if gathered columns are on this rank, where they must be."""
    peers, memory = peers_of(group, Needs(4, 64, rows, columns, 2), Limits(NEVER, NEVER))
    parts = [drawn(rank, rows, columns) for rank in range(group.size)]
    out = torch.zeros(rows, width, device="cuda", dtype=torch.bfloat16)
    gathering = peers.gathering(parts[group.rank], out, True)
    for _ in range(3):
        gathering.run(rows)
    torch.cuda.synchronize()
    peers.check()
    ok = group.rank > 0 or torch.equal(out, torch.cat(parts, 1)[:, :width])
    group.exchange(b"")
    memory.close()
    return bool(ok)


def absent(group: Group) -> str:
    """Return the error of rank 0, for which no other rank comes."""
    peers, memory = peers_of(group, Needs(1, 64, 1, 8, 2), Limits(NEVER, NEVER))
    peers.wait_up_to(0.05)
    error = ""
    if group.rank == 0:
        x = drawn(0, 1, 32)
        reduction = peers.reduction(x, torch.empty_like(x))
        for _ in range(100):
            reduction.run(1)
        torch.cuda.synchronize()
        try:
            peers.check()
        except RuntimeError as found:
            error = str(found)
    group.exchange(b"")
    memory.close()
    return error


def logits(
    group: Group, folder: str, rows_of_steps: Steps, config: dict[str, Any] | None = None, **options: Any
) -> Any:
    """Return the logits of steps on rank 0, and their tokens on every rank. `config`: of random weights."""
    if config is not None:
        from bench.gpu.engine import RandomWeights

        options["source"] = RandomWeights(config)
    options["limits"] = StepLimits(*options.get("limits", (256, 4, 256, 16)))
    driver = CudaDriver(folder, group=group, **options)
    found = []
    try:
        for rows in rows_of_steps:
            made = driver.feed(rows)
            found.append((driver.token_ids, made if group.rank == 0 else None))
    finally:
        group.exchange(b"")
        driver.close()
    return found


def answers(group: Group, folder: str, prompts: list[list[int]], count: int, **options: Any) -> Any:
    """Return the tokens and log-probabilities of prompts with all kinds of parameters, from an engine on each rank."""
    from support_cuda import cuda_job

    source = open_checkpoint(local_source(folder))
    program, limits = program_of(source.config), StepLimits(64, 8, 128, 16)
    made = EncoderDecoderBackend if encodes(program) else CudaBackend
    backend = made(cuda_job(program, source, limits, group=group, cuda_graphs=(1, 4), **options))
    backend.allocate(48)
    backend.warm_up()
    limits_of = SchedulerLimits(64, 8, 128, 16, shares_prefixes=not encodes(program), windows=backend.windows)
    scheduler = Scheduler(BlockPool(48, 16), limits_of)
    info = EngineInfo("tiny", "float32", "cuda", "cuda", 48, 16, 128, 127, 128, 1, 1)
    parts = Assembled(scheduler, Executor(backend, 8), info)
    parts._resources.callback(backend.close)
    params = [
        SamplingParams(), SamplingParams(temperature=0.8, seed=3), SamplingParams(temperature=1.0, top_p=0.8, seed=5),
        SamplingParams(temperature=0.7, top_k=9, repetition_penalty=1.2, seed=7), SamplingParams(logprobs=3),
        SamplingParams(prompt_logprobs=1, logprobs=1, temperature=0.9, seed=2),
    ]  # fmt: skip
    with OfflineEngine(parts) as engine:
        ids = [
            engine.submit(prompt, params[i % len(params)], StoppingParams(count)) for i, prompt in enumerate(prompts)
        ]
        tokens, details = [], []
        for each in ids:
            outputs = list(engine.outputs(each))
            tokens.append([token for output in outputs for token in output.token_ids])
            details.append([[d.logprob for d in output.details or () if d is not None] for output in outputs])
        group.exchange(b"")
        return tokens, (details if group.rank == 0 else None)


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float((np.linalg.norm(found - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)).max())
