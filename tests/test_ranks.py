"""Engine processes as the supervisor starts them: two ranks over gloo give the same tokens as one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from oracle import prompt_details_of
from support_jobs import job_of
from support_models import make_checkpoint
from support_quantized import packed, quantize_folder
from support_text import byte_level
from test_quant_stored import grouped
from test_quant_whole import LINEAR

from tokenmill import config
from tokenmill.backends.base import StepLimits
from tokenmill.backends.kind import BackendOptions
from tokenmill.backends.torch.backend import TorchBackend
from tokenmill.config import Settings
from tokenmill.models.base import program_of
from tokenmill.parallel.group import Group
from tokenmill.process import Child
from tokenmill.program.cost import weights_of
from tokenmill.runtime.assembly import EngineOptions, assemble
from tokenmill.runtime.offline import OfflineEngine
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source
from tokenmill.wire.channel import Channel
from tokenmill.wire.messages import (
    Abort,
    Configure,
    EngineInfo,
    Failed,
    FromEngine,
    GrammarSpec,
    ModelReady,
    Output,
    Ready,
    Request,
    SamplingParams,
    StepOutputs,
    StoppingParams,
)

torch.set_num_threads(1)
LIMITS = StepLimits(max_batch_tokens=13, max_batch_size=6, max_total_tokens=64, block_size=4)
NUM_BLOCKS = 24  # far fewer than six sequences need


class Engine:
    """The processes of an engine, and a connection of an HTTP worker."""

    def __init__(self, settings: Settings, folder: Path, run_dir: Path) -> None:
        self.address = str(run_dir / "engine.sock")
        self.model = ModelReady(msgspec.to_builtins(local_source(folder)))
        self.children = []
        for rank in range(settings.ranks_per_engine):
            configure = Configure(settings.to_dict(), rank, (self.address,), str(run_dir))
            child = Child(f"rank {rank}", "tokenmill.runtime.worker:main", configure, config.environment(1))
            child.control.send(self.model)
            self.children.append(child)

    def wait_for(self, kind: type, timeout_s: float = 90.0) -> list[object]:
        """Return the first message of this type from each child."""
        found: dict[str, object] = {}
        deadline = time.monotonic() + timeout_s
        while len(found) < len(self.children):
            assert time.monotonic() < deadline, "the engine does not start"
            for child in self.children:
                dead = child.dead
                for message in child.poll():
                    if isinstance(message, kind):
                        found[child.name] = message
                assert not dead or child.name in found, child.how_it_ended()
            time.sleep(0.02)
        return [found[child.name] for child in self.children]

    def connect(self) -> Channel[FromEngine]:
        channel: Channel[FromEngine] = Channel.connect(self.address, FromEngine, timeout_s=5.0)
        channel.set_timeout(60.0)
        return channel

    def wait_for_end(self) -> list[int]:
        return [child.process.wait(20.0) for child in self.children]


@contextmanager
def running(settings: Settings, folder: Path, run_dir: Path) -> Iterator[Engine]:
    engine = Engine(settings, folder, run_dir)
    try:
        yield engine
    finally:
        for child in engine.children:
            child.kill()


def save(folder: Path) -> None:
    """Write a quantized model with experts, whose heads, experts and vocabulary two ranks do not divide."""
    sizes = {"num_attention_heads": 9, "num_key_value_heads": 3, "num_experts": 5, "vocab_size": 605, "eos_token_id": 2}
    make_checkpoint(folder, "qwen3_moe", **sizes)
    quantize_folder(folder, grouped(4, 32), lambda module: packed(4, 32) if module.endswith(LINEAR) else None)
    byte_level().save(str(folder / "tokenizer.json"))


def requests() -> list[Request]:
    """Return greedy and sampled requests, with shared prefixes, filters, log-probabilities, and grammars."""
    rng = np.random.default_rng(5)
    head = rng.integers(0, 128, 14).tolist()
    made = []
    for i in range(12):
        prompt = head[: rng.integers(0, 15)] + rng.integers(0, 128, rng.integers(1, 6)).tolist()
        params = SamplingParams(
            temperature=(0.0, 0.8, 1.0)[i % 3],
            top_p=(1.0, 0.9)[i % 2],
            repetition_penalty=(1.0, 1.0, 1.2)[i % 3],
            seed=i,
            logprobs=(-1, 2)[i % 4 == 0],
            prompt_logprobs=(-1, 0)[i % 5 == 0],
        )
        grammar = GrammarSpec("regex", "(ab|ba){3,9}") if i % 4 == 2 else None
        forced = {"force_after": 4, "forced_ids": (3, 4, 5, 6)} if i % 3 == 1 and grammar is None else {}
        stopping = StoppingParams(int(rng.integers(8, 30)), 0, (int(rng.integers(128)),), **forced)
        made.append(Request(i + 1, tuple(prompt), params, stopping, grammar=grammar))
    return made


def alone(folder: Path) -> dict[int, list[int]]:
    """Return the tokens of each request from one rank in this process, one request after another."""
    backend = BackendOptions(backend="torch", device="cpu")
    wants = EngineOptions(backend=backend, block_size=4, max_batch_size=1, max_total_tokens=64, grammars=True)
    with OfflineEngine(assemble(local_source(folder), wants, Group(), lambda _: None)) as engine:

        def tokens(r: Request) -> list[int]:
            own = engine.submit(r.prompt_ids, r.sampling, r.stopping, grammar=r.grammar)
            return [token for output in engine.outputs(own) for token in output.token_ids]

        return {r.id: tokens(r) for r in requests()}


def memory_limit(folder: Path, ranks: int) -> str:
    """Return the limit that leaves each rank `NUM_BLOCKS` blocks."""
    source = open_checkpoint(local_source(folder))
    program = program_of(source.config)
    backend = TorchBackend(job_of(program, source, LIMITS, group=Group(0, ranks), expert_parallel=True))
    weights = sum(weight.size for weight in weights_of(backend.program)) * 4
    need = weights + backend.step_bytes() + NUM_BLOCKS * backend.block_bytes() + 10
    backend.close()
    return f"{need * ranks}"


def serve(channel: Channel[FromEngine], wanted: list[Request]) -> tuple[dict[int, list[Output]], StepOutputs]:
    """Send requests a few at a time, and abort one of them. Return all outputs, and the last frame."""
    info = channel.receive()
    assert isinstance(info, EngineInfo)
    outputs: dict[int, list[Output]] = {r.id: [] for r in wanted}
    waiting = list(wanted)
    gone = msgspec.structs.replace(wanted[0], id=999)
    open_ids = set(outputs)
    frame = StepOutputs((), None)  # type: ignore[arg-type]
    while open_ids:
        if waiting:
            channel.send([waiting.pop(0)] + ([gone] if len(waiting) == 8 else []))
            if len(waiting) == 6:
                channel.send([Abort(999)])
        message = channel.receive()
        assert isinstance(message, StepOutputs)
        frame = message
        for output in message.outputs:
            outputs.setdefault(output.request_id, []).append(output)
            if output.finish_reason:
                open_ids.discard(output.request_id)
    return outputs, frame


def test_two_ranks_say_token_for_token_what_one_says_alone(tmp_path, run_dir):
    save(tmp_path)
    expected = alone(tmp_path)
    settings = Settings(
        backend="torch", device="cpu", num_shard=2, enable_expert_parallel=True, block_size=4, max_batch_size=6,
        max_batch_prefill_tokens=13, max_total_tokens=64, memory_limit=memory_limit(tmp_path, 2), debug_plans=True,
    )  # fmt: skip
    with running(settings, tmp_path, run_dir) as engine:
        infos = engine.wait_for(Ready)
        assert [m.info is None for m in infos] == [False, True]
        info = infos[0].info
        assert (info.num_blocks, info.num_shard) == (NUM_BLOCKS, 2)
        channel = engine.connect()
        outputs, frame = serve(channel, requests())
        found = {i: [t for o in outputs[i] for t in o.token_ids] for i in expected}
        assert found == expected
        assert frame.stats.preemptions > 0
        assert frame.stats.cached_tokens > 0
        assert frame.stats.forced_tokens > 0
        assert outputs.get(999, [Output(999)])[-1].finish_reason == ""
        for request in requests():
            own = outputs[request.id]
            details = [d for o in own for d in o.details]
            assert len(details) == (len(expected[request.id]) if request.sampling.logprobs >= 0 else 0)
            prompt_details = prompt_details_of(own)
            wants_prompt = request.sampling.prompt_logprobs >= 0
            assert len(prompt_details) == (len(request.prompt_ids) - 1 if wants_prompt else 0)
        for child in engine.children:
            child.stop()
        assert engine.wait_for_end() == [0, 0]


def test_an_idle_engine_beats_its_heart_and_ends_with_its_supervisor(tmp_path, run_dir):
    make_checkpoint(tmp_path, "llama", num_hidden_layers=1)
    with running(Settings(max_total_tokens=64), tmp_path, run_dir) as engine:
        engine.wait_for(Ready)
        channel = engine.connect()
        assert isinstance(channel.receive(), EngineInfo)
        began = time.monotonic()
        assert isinstance(channel.receive(), StepOutputs)
        assert isinstance(channel.receive(), StepOutputs)
        assert time.monotonic() - began < 3.5
        for child in engine.children:
            child.control.close()  # as if the supervisor had been killed
        began = time.monotonic()
        assert engine.wait_for_end() == [0]
        assert time.monotonic() - began < 3.0


@pytest.mark.parametrize(
    "changes,variant,text",
    [
        ({"memory_limit": "1kB"}, "ShardCannotStart", "weights need"),
        ({"max_total_tokens": 50, "max_input_tokens": 50}, "ArgumentValidation", "max_input_tokens"),
    ],
)
def test_what_can_never_start_says_so_to_the_supervisor(changes, variant, text, tmp_path, run_dir):
    make_checkpoint(tmp_path, "llama", num_hidden_layers=1)
    with running(Settings(**changes), tmp_path, run_dir) as engine:
        [failed] = engine.wait_for(Failed)
        assert (failed.variant, failed.fatal) == (variant, True)
        assert text in failed.message
        assert engine.wait_for_end() == [1]
