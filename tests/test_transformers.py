"""Models that transformers computes: the same text as transformers' own; refusals, with their reasons; others' code."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support_jobs import job_of
from support_models import FAMILIES, LATENT, SIZES, make_checkpoint, write_model
from test_offline import crowded_engine
from transformers.models.auto import modeling_auto

from tokenmill.backends.base import StepLimits
from tokenmill.backends.kind import BackendOptions, Placement
from tokenmill.backends.transformers import KIND, defined
from tokenmill.backends.transformers.backend import TransformersBackend
from tokenmill.backends.transformers.record import _window
from tokenmill.config import Settings
from tokenmill.errors import ModelError, StartError, Unsupported
from tokenmill.operate.doctor import examine
from tokenmill.parallel.group import Group
from tokenmill.program.foreign import TransformersAttention, TransformersBody
from tokenmill.program.value import Program
from tokenmill.runtime import programs
from tokenmill.runtime.assembly import EngineOptions, assemble
from tokenmill.runtime.choice import choose
from tokenmill.runtime.offline import OfflineEngine
from tokenmill.runtime.programs import programs_for
from tokenmill.weights.checkpoint import Checkpoint, open_checkpoint
from tokenmill.weights.choice import Weights
from tokenmill.weights.hub import wanted_files
from tokenmill.weights.source import local_source
from tokenmill.wire.messages import SamplingParams, StoppingParams

torch.set_num_threads(1)
ALWAYS = BackendOptions(backend="transformers", device="cpu")
NOT_OURS: dict[str, dict[str, Any]] = {
    "jais2": {},
    "diffllama": {},
    "bitnet": {},
    "minicpm3": LATENT | {"v_head_dim": 16},
}
CODE = '''
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
'''
SHIFT = '''
import torch
from transformers.models.llama.modeling_llama import LlamaMLP
class Shifted(LlamaMLP):
    def forward(self, x):
        return super().forward(x) + torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
class OwnModel(OwnModel):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = Shifted(config)
'''


class Config:
    """Stand-in for a checkpoint of which only the configuration is read."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config


def recorded(config: dict[str, Any], options: BackendOptions = ALWAYS) -> Program:
    source: Any = Config(config)
    return programs_for(source, options).decoder


def save(folder: Path, name: str, **changes: Any) -> Any:
    """Write a tiny model of a family of this package, or of a model type that it does not have."""
    if name in FAMILIES:
        return make_checkpoint(folder, name, **changes)
    return write_model(folder, name, SIZES | NOT_OURS[name] | changes)


def own_model(folder: Path, code: str = CODE) -> Any:
    """Write a Llama under another name, with Python code in its folder that defines it."""
    model = make_checkpoint(folder, "llama")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {
        "AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text(code)
    return model


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count,
                          eos_token_id=None, pad_token_id=0)  # fmt: skip
    return made[0, len(prompt) :].tolist()


def engine_of(folder: Path, **options: Any) -> OfflineEngine:
    found = EngineOptions(backend=BackendOptions(device="cpu", **options), memory_limit=64 << 20, max_batch_tokens=64)
    return OfflineEngine(assemble(local_source(folder), found, Group(), lambda progress: None))


@pytest.mark.parametrize(
    "family",
    ["gpt_oss", "diffllama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gemma2", "minicpm3", "qwen3_moe"))],
)
def test_chunked_shared_and_preempted_sequences_get_transformers_greedy_text(family: str, tmp_path: Path) -> None:
    model = save(tmp_path, family, max_position_embeddings=64)
    rng = np.random.default_rng(1)
    head = rng.integers(0, 128, 21).tolist()
    prompts = [head[: rng.integers(0, 22)] + rng.integers(0, 128, rng.integers(1, 9)).tolist() for _ in range(6)]
    counts = [int(n) for n in rng.integers(5, 20, 6)]

    def made(source: Checkpoint, limits: StepLimits) -> TransformersBackend:
        return TransformersBackend(job_of(programs_for(source, ALWAYS).decoder, source, limits))

    with crowded_engine(tmp_path, 17, StepLimits(11, 5, 64, 4), made) as engine:
        ids = [engine.submit(p, None, StoppingParams(n)) for p, n in zip(prompts, counts, strict=True)]
        found = [[t for o in engine.outputs(i) for t in o.token_ids] for i in ids]
        windowed = family in ("gemma2", "gpt_oss")  # admitted with nearly all that they ever need
        assert windowed or (engine.stats.cached_tokens > 0 and engine.stats.preemptions > 0)
    assert found == [greedy(model, *both) for both in zip(prompts, counts, strict=True)]


@pytest.fixture
def nothing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the files of models/, to which others are added."""
    monkeypatch.setattr(programs, "_is_here", lambda name: False)


@pytest.mark.usefixtures("nothing_here")
@pytest.mark.parametrize("name", ["jais2", pytest.param("bitnet", marks=pytest.mark.slow)])
def test_a_model_type_without_a_file_is_served_and_that_is_said_aloud(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = save(tmp_path, name)
    with caplog.at_level(logging.WARNING, "tokenmill"), engine_of(tmp_path) as engine:
        assert engine.info.backend == "transformers"
        assert engine.info.max_total_tokens == 256
        assert engine.generate([[5, 6, 7], [9] * 70], None, StoppingParams(6)) == [
            greedy(model, [5, 6, 7], 6), greedy(model, [9] * 70, 6),
        ]  # fmt: skip
        prompt = [3, 1, 4, 1, 5]
        request = engine.submit(prompt, SamplingParams(logprobs=2, prompt_logprobs=0), StoppingParams(1))
        outputs = list(engine.outputs(request))
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    payload = next(output.payload for output in outputs if output.payload)
    assert [d.logprob for d in payload.details] == pytest.approx(
        [float(expected[i, token]) for i, token in enumerate(prompt[1:])], abs=1e-4
    )
    assert outputs[-1].details[0].top_ids == tuple(expected[-1].topk(2).indices.tolist())
    assert f"transformers computes this {name} model" in caplog.text
    assert "does not read" not in caplog.text


def test_code_in_a_models_folder_is_run_only_if_it_is_trusted(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    model = own_model(tmp_path, f"open({str(ran)!r}, 'w').close()\n{CODE}")
    source = open_checkpoint(local_source(tmp_path))
    with pytest.raises(Unsupported, match=r"'own' is not supported.*--trust-remote-code"):
        programs_for(source, BackendOptions())
    assert not ran.exists()
    with engine_of(tmp_path, trust_remote_code=True) as engine:
        assert engine.generate([[5, 6, 7]], None, StoppingParams(6)) == [greedy(model, [5, 6, 7], 6)]
    assert ran.exists()


def test_code_that_is_not_there_or_elsewhere_is_named(tmp_path: Path) -> None:
    own_model(tmp_path)
    (tmp_path / "modeling_own.py").unlink()
    trusting = BackendOptions(trust_remote_code=True)
    with pytest.raises(Unsupported, match="does not define it as a causal language model either"):
        programs_for(open_checkpoint(local_source(tmp_path)), trusting)
    config = {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "some/other--file.Class"}}
    with pytest.raises(ModelError, match="another repository \\(some/other\\)"):
        recorded(config, trusting)


def test_a_model_that_looks_at_other_tokens_otherwise_is_refused_when_it_starts(tmp_path: Path) -> None:
    own_model(tmp_path, CODE + SHIFT)
    with pytest.raises(Unsupported, match="logits with tokenmill's attention differ"):
        engine_of(tmp_path, trust_remote_code=True)


@pytest.mark.usefixtures("nothing_here")
@pytest.mark.parametrize("config, words", [
    ({"model_type": "unheard"}, "Supported: .*llama.*does not define it as a causal language model either"),
    ({"model_type": "vit"}, "does not define it as a causal language model either"),
    ({"model_type": "rwkv"}, "its layers keep a state"),
    ({"model_type": "zamba2"}, "its layers of hybrid.* keep a state"),
    ({"model_type": "bert"}, "a mask that is neither causal nor a sliding window"),
    ({"model_type": "xglm"}, "its attention cannot be replaced"),
    ({"model_type": "doge", "num_hidden_layers": 1}, "a mask that is made from its numbers"),
    ({"model_type": "pegasus"}, "an encoder and a decoder"),
    ({"model_type": "llama4_text", "num_hidden_layers": 1}, "is not supported"),
    ({"model_type": "jais2", **SIZES, "hidden_act": "swish7"}, "KeyError: .*swish7"),
    ({"model_type": "jais2", **SIZES, "hidden_size": "wide"}, "config.json makes no .* jais2"),
])  # fmt: skip
def test_a_model_that_cannot_be_served_so_is_refused_with_the_reason(config: dict[str, Any], words: str) -> None:
    with pytest.raises(StartError, match=words):
        recorded(config, BackendOptions())


def test_an_unheard_model_type_is_refused_without_importing_transformers(tmp_path: Path) -> None:
    (tmp_path / "modeling_own.py").touch()
    configs = [
        {"model_type": "lama"},
        {"model_type": "bart-base"},
        {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnModel"}},
    ]
    source = f"""
import sys
from types import SimpleNamespace
from tokenmill.backends.kind import BackendOptions
from tokenmill.errors import Unsupported
from tokenmill.runtime.programs import programs_for
for config in {configs!r}:
    try:
        programs_for(SimpleNamespace(config=config, folder={str(tmp_path)!r}), BackendOptions())
    except Unsupported as error:
        print(error.name, sorted({{"torch", "transformers"}} & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.split("\n") == ["lama []", "bart-base []", "own []", ""]


def test_the_types_that_are_read_from_transformers_source_are_those_of_its_table() -> None:
    assert defined.listed() == set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize("table", ["", "dict(a=1)", "OrderedDict(**o)", "OrderedDict([*o])", "OrderedDict(3)"])
def test_a_table_of_another_form_leaves_the_choice_to_transformers(table: str) -> None:
    assert defined.types_in(f"MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = {table or None}".encode()) is None


@pytest.mark.usefixtures("nothing_here")
def test_without_transformers_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "has_transformers", lambda: False)
    with pytest.raises(Unsupported, match=r"'jais2' is not supported.*pip install 'tokenmill\[transformers\]'"):
        recorded({"model_type": "jais2"}, BackendOptions())


@pytest.mark.parametrize("options, ranks, words", [
    ({}, 2, "`num-shard` is 2"),
    ({"quantize": "int8"}, 1, "`quantize` is int8"),
    ({"kv_cache_dtype": "int8"}, 1, "The transformers backend's cache"),
    ({"deterministic": True}, 1, "the transformers backend's sums"),
])  # fmt: skip
def test_options_that_it_does_not_have_are_refused(options: dict[str, Any], ranks: int, words: str) -> None:
    with pytest.raises(StartError, match=words):
        KIND.check(BackendOptions(**options), Placement("cpu", 16, ranks), "")


def test_quantized_weights_are_refused_by_their_method(tmp_path: Path) -> None:
    save(tmp_path, "jais2")
    source = open_checkpoint(local_source(tmp_path))
    program = programs_for(source, ALWAYS).decoder
    stored = sum(source.nbytes(name) for name in source.names())
    assert KIND.weight_bytes(program, source, "float32") == stored
    source = open_checkpoint(local_source(tmp_path))  # what describes a checkpoint is looked up once
    source.config["quantization_config"] = {"quant_method": "gptq"}
    with pytest.raises(ModelError, match="quantized \\(gptq: quantization_config"):
        KIND.weight_bytes(program, source, "float32")


@pytest.mark.usefixtures("nothing_here")
def test_doctor_says_who_computes(tmp_path: Path) -> None:
    save(tmp_path, "jais2")
    settings = Settings.from_args(["--model-id", str(tmp_path), "--device", "cpu"], prog="tokenmill doctor")
    found = next(finding for finding in examine(settings) if finding.name == "backend")
    assert found.verdict == "note"
    assert found.text.startswith("transformers, float32, weights ")
    assert found.text.endswith("transformers computes it, which is slower than a model type of docs/models.md")
    with pytest.raises(Unsupported, match=r"The backend 'cpu' is not supported\. Supported: transformers"):
        choose(recorded({"model_type": "jais2", **SIZES}), BackendOptions(backend="cpu"), 16, 1)


@pytest.mark.usefixtures("nothing_here")
def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    save(tmp_path, "jais2")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ModelError, match=r"no tensor 'model.layers.3"):
        engine_of(tmp_path)


def test_each_call_of_attention_is_recorded_with_its_window() -> None:
    own = FAMILIES["gemma2"][1] | {"num_hidden_layers": 2}
    program = recorded({"model_type": "gemma2", **SIZES, **own})
    calls = [op for op in program.ops if isinstance(op, TransformersAttention)]
    assert [(c.heads, c.kv_heads, c.head_dim, c.window, c.softcap) for c in calls] == [
        (4, 2, 16, 8, 3.0), (4, 2, 16, 0, 3.0),
    ]  # fmt: skip
    assert calls[0].scale == pytest.approx(20**-0.5)
    body = next(op for op in program.ops if isinstance(op, TransformersBody))
    assert (body.out.width, program.logits.width) == (64, 128)


def test_rotations_that_depend_on_the_longest_sequence_limit_the_length() -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    source: Any = Config({"model_type": "llama", **SIZES, "rope_parameters": scaling})
    assert programs_for(source, ALWAYS).config.max_positions == 256
    source.config = {"model_type": "phi3", **SIZES, **FAMILIES["phi3_longrope"][1]}
    assert programs_for(source, ALWAYS).config.max_positions == 128


def test_only_causal_masks_and_sliding_windows_are_masks_here() -> None:
    assert _window(lambda b, h, q, k: k <= q, 100) == 0
    assert _window(lambda b, h, q, k: (k <= q) & (k > q - 7), 100) == 7
    assert _window(lambda b, h, q, k: (k <= q) & (k > q - 200), 100) == 0
    for other in (
        lambda b, h, q, k: k >= 0 * q,
        lambda b, h, q, k: (k <= q) & (k // 30 == q // 30),
        lambda b, h, q, k: (k <= q) | (k < 4),
        lambda b, h, q, k: (k <= q) & (k % 2 == 0),
    ):
        with pytest.raises(ModelError, match="neither causal nor a sliding window"):
            _window(other, 100)


def test_python_files_are_downloaded_only_where_they_may_be_run() -> None:
    names = ["config.json", "model.safetensors", "modeling_own.py", "deep/args.py", "README.md"]
    weights = Weights("safetensors", ("model.safetensors",))
    assert wanted_files(names, weights) == ["config.json", "model.safetensors"]
    assert wanted_files(iter(names), weights, code=True) == [
        "config.json", "deep/args.py", "model.safetensors", "modeling_own.py",
    ]  # fmt: skip
