"""`tokenmill quantize`: the rounding against its definition, the files it writes, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support_models import Driver, make_checkpoint, prompts
from support_text import byte_level

from tokenmill import cli
from tokenmill.backends.torch.gptq import Recipe, rounded
from tokenmill.errors import ArgumentError, ModelError, StartError, Unsupported
from tokenmill.operate import quantize
from tokenmill.weights.checkpoint import Safetensors

torch.set_num_threads(1)


def activations(inputs: int, seed: int = 0) -> torch.Tensor:
    """Return correlated activations, of which one column is never used."""
    torch.manual_seed(seed)
    x = torch.randn(512, inputs // 4) @ torch.randn(inputs // 4, inputs) + 0.1 * torch.randn(512, inputs)
    x[:, 3] = 0
    return x


def by_definition(w: np.ndarray, hessian: np.ndarray, group: int, damping: float) -> np.ndarray:
    """Round by optimal brain surgery, one column at a time, with the inverse of what is left of the hessian."""
    w, h, out = w.astype(np.float64).copy(), hessian.astype(np.float64).copy(), np.zeros(w.shape)
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h[np.diag_indices(len(h))] += damping * h.diagonal().mean()
    for i in range(w.shape[1]):
        if i % group == 0:
            scale = (np.abs(w[:, i : i + group]).max(1) * 2 / 15).astype(np.float16).astype(np.float64)
        inverse = np.linalg.inv(h[i:, i:])
        out[:, i] = np.clip(np.rint(w[:, i] / scale), -8, 7) * scale
        error = (w[:, i] - out[:, i]) / inverse[0, 0]
        w[:, i + 1 :] -= np.outer(error, inverse[0, 1:])
    return out


def test_rounding_is_that_of_the_definition() -> None:
    x, w = activations(64), torch.randn(24, 64)
    hessian = x.T @ x
    made = rounded(w, hessian, Recipe(16))
    want = by_definition(w.numpy(), hessian.numpy(), 16, 0.01)
    same = np.isclose(made.numbers.numpy(), want, rtol=1e-3, atol=1e-4).mean()
    assert same > 0.97  # a number halfway between two codes may fall to either
    numbers = (made.codes.float() - 8) * made.scale.float()[:, made.group_of]
    assert torch.equal(numbers, made.numbers)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [16, 0])
def test_products_change_less_than_by_rounding_to_the_nearest(group: int, act_order: bool) -> None:
    x, w = activations(64), torch.randn(24, 64)
    made = rounded(w, x.T @ x, Recipe(group, act_order))
    blocks = w.view(24, -1, group or 64)
    scale = blocks.abs().amax(-1, keepdim=True) * 2 / 15
    nearest = ((blocks / scale).round().clamp(-8, 7) * scale).view_as(w)
    errors = [float((x @ (other - w).T).norm()) for other in (made.numbers, nearest)]
    assert errors[0] < 0.6 * errors[1]
    counts = torch.bincount(made.group_of).tolist()
    assert counts == ([16] * 4 if group else [64])
    assert (made.group_of.tolist() == sorted(made.group_of.tolist())) == (not (act_order and group))


def test_activations_that_are_no_numbers_are_refused() -> None:
    hessian = torch.full((16, 16), torch.nan)
    with pytest.raises(ModelError, match=r"no finite numbers.*--percdamp"):
        rounded(torch.randn(4, 16), hessian, Recipe(16))


def model(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """Write a tiny model with a tokenizer of bytes."""
    make_checkpoint(folder, family, vocab_size=600, **changes)
    byte_level().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def run(source: Path, out: Path, *words: str) -> None:
    sizes = "--groupsize", "16", "--samples", "4", "--length", "64"
    assert cli.text_generation_server(["quantize", str(source), str(out), *sizes, *words]) == 0


@pytest.mark.parametrize("act_order", [False, True])
def test_a_written_checkpoint_is_gptq_and_computes_nearly_the_same(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], act_order: bool
) -> None:
    source, out = model(tmp_path / "model"), tmp_path / "out"
    run(source, out, *["--act-order"] * act_order)
    told = capfd.readouterr().out
    before, after = (float(told.split(f" {word}")[0].split()[-1]) for word in ("before", "after"))
    assert abs(after / before - 1) < 0.2
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"], config["desc_act"]) == (
        "gptq",
        4,
        16,
        act_order,
    )
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not list(out.glob(".*"))
    tensors, plain = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    modules = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    assert modules == {name.removesuffix(".weight") for name in plain if "_proj" in name and plain[name].ndim == 2}
    np.testing.assert_array_equal(tensors["lm_head.weight"], plain["lm_head.weight"])
    steps = [(0, prompts()[1])]
    got, want = (Driver.of(folder).feed(steps) for folder in (out, source))
    assert np.corrcoef(got[0], want[0])[0, 1] > 0.95


@pytest.mark.slow
def test_fused_and_transposed_matrices_are_quantized_whole(tmp_path: Path) -> None:
    for family, names in (
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
        ("phi3", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    ):
        source, out = model(tmp_path / family, family), tmp_path / f"{family}-out"
        run(source, out)
        written = Safetensors(out)
        found = {name.split(".")[-2] for name in written.names() if name.endswith(".qweight")}
        assert found == names
        steps = [(0, prompts()[1])]
        got, want = (Driver.of(folder).feed(steps) for folder in (out, source))
        assert np.corrcoef(got[0], want[0])[0, 1] > 0.85


@pytest.mark.parametrize(
    "words, why",
    [
        (["--groupsize", "48"], "`groupsize` is 48, but .* 128 inputs, no multiple of it. Give 64, 32, 16, -1"),
        (["--groupsize", "0"], "`groupsize` is 0; it must be -1 or a multiple of 8"),
        (["--percdamp", "2"], "`percdamp` is 2.0; it must be between 0 and 1"),
        (["--samples", "0"], "`samples` is 0; it must be at least 1"),
        (["--upload-to-model-id", "me/it"], "`upload-to-model-id` is not supported. Leave it out"),
        (["--calibration", "/nowhere/text"], "`calibration` /nowhere/text cannot be read"),
        (["--length", "1000000"], r"has \d+ tokens, not the 1000000 of --length. Give a longer one"),
    ],
)
def test_arguments_that_cannot_be_used_are_explained(tmp_path: Path, words: list[str], why: str) -> None:
    source = model(tmp_path / "model")
    with pytest.raises(ArgumentError, match=why):
        quantize.main([str(source), str(tmp_path / "out"), "--groupsize", "16", *words])


def test_what_is_quantized_already_or_has_experts_is_refused(tmp_path: Path) -> None:
    source = model(tmp_path / "model")
    with pytest.raises(ArgumentError, match=r"it holds a model. Give another OUTPUT_DIR"):
        quantize.main([str(source), str(source), "--groupsize", "16"])
    small = model(tmp_path / "small")
    path = small / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"vocab_size": 128}))
    with pytest.raises(ModelError, match=r"tokenizer makes ids up to \d+, but the model has 128"):
        quantize.main([str(small), str(tmp_path / "out"), "--groupsize", "16"])
    with pytest.raises(Unsupported, match="has experts; only dense language models"):
        quantize.main([str(model(tmp_path / "experts", "mixtral")), str(tmp_path / "out")])
    path = source / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(StartError, match=r"quantized already, as 'gptq'. Give the model that it was made from"):
        quantize.main([str(source), str(tmp_path / "out")])
