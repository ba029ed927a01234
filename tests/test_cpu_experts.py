"""Mixtures of experts on the CPU: routing and grouped products equal torch's in every form of weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support_cpu import CpuDriver
from support_models import Driver
from support_programs import VOCABULARY, WIDTH, Arrays, Draw

from tokenmill.backends.cpu.prepare import refusal
from tokenmill.program import ops
from tokenmill.program.ops import Weight
from tokenmill.program.value import Inputs, Program, Value, record
from tokenmill.quant.base import reader_of

torch.set_num_threads(1)
INNER, COUNT = 96, 12
STEPS = [[(0, list(range(40))), (1, [3, 5, 60])], [(0, [7]), (1, [9, 11])]]


def layer(seed: int, more: dict[str, Any] | None = None, **choice: Any) -> tuple[Program, Arrays]:
    """Return a program of one mixture of experts on embeddings. `choice`: of its Route; `more`: of its Experts."""
    draw = Draw(seed)
    draw.chance = lambda share: False  # type: ignore[method-assign]

    def model(inputs: Inputs) -> Value:
        x = inputs.ids.record(ops.Embed, WIDTH, ids=inputs.ids, table=draw.weight(VOCABULARY, WIDTH, table=True))
        x = x.record(ops.TakeRows, rows="samples", x=x) if choice.pop("samples", False) else x
        top_k = choice.pop("top_k", 3)
        ids, factors = (x.tape.new(x.spec.rows, top_k, kind) for kind in ("ids", "float"))
        given = {name: draw.weight(COUNT) for name in ("bias", "correction") if choice.pop(name, False)}
        router = draw.weight(COUNT, WIDTH, exact=True)
        x.tape.ops.append(ops.Route(out=ids, factors=factors, x=x, weight=router, top_k=top_k, **given, **choice))

        def gate_up(columns: int) -> Weight:
            return Weight(tuple(draw.weight(INNER, columns).parts[0] for _ in range(2)), columns)

        fields = {"act": "silu", **(more or {})}
        if fields.pop("biased", False):
            fields |= {"gate_up_bias": tuple(gate_up(0) for _ in range(COUNT))}
            fields |= {"down_bias": tuple(draw.weight(WIDTH) for _ in range(COUNT))}
        y = x.record(
            ops.Experts, x=x, ids=ids, factors=factors, gate_up=tuple(gate_up(WIDTH) for _ in range(COUNT)),
            down=tuple(draw.weight(WIDTH, INNER) for _ in range(COUNT)), **fields,
        )  # fmt: skip
        y = y if y.spec.rows == "samples" else y.record(ops.TakeRows, rows="samples", x=y)
        return draw.linear(y, VOCABULARY)[0]

    return record(model), draw.source()


def logits(program: Program, source: Arrays, **options: Any) -> list[np.ndarray]:
    backend = CpuDriver(source, program=program, **options)  # type: ignore[arg-type]
    found = [backend.feed(rows).copy() for rows in STEPS]
    backend.close()
    return found


def wanted(program: Program, source: Arrays) -> list[np.ndarray]:
    backend = Driver(program, source)  # type: ignore[arg-type]
    found = [backend.feed(rows) for rows in STEPS]
    backend.close()
    return found


CHOICES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "one": {"top_k": 1, "renormalize": True},
    "all": {"top_k": COUNT},
    "biased": {"bias": True, "renormalize": True, "scale": 2.5},
    "corrected": {"correction": True},
    "sigmoid": {"score": "sigmoid", "correction": True, "renormalize": True, "least_sum": 1e-20, "scale": 0.5},
    "a sum too small": {"renormalize": True, "least_sum": 0.9},
    "groups": {"groups": 4, "top_groups": 2, "group_best": 1},
    "groups of two best": {"groups": 3, "top_groups": 1, "group_best": 2, "score": "sigmoid", "correction": True},
    "rows that sample": {"samples": True},
    "sparsemixer": {"score": "sparsemixer", "margin": 0.3, "top_k": 2},
    "sparsemixer with a bias": {"score": "sparsemixer", "margin": 0.05, "bias": True},
}


@pytest.mark.parametrize("name", CHOICES)
def test_each_choice_of_experts_equals_torch(name: str) -> None:
    for seed in range(3):
        program, source = layer(seed, **CHOICES[name])
        for got, want in zip(logits(program, source), wanted(program, source), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "more",
    [
        {"act": "gelu"}, {"act": "relu", "biased": True}, {"act": "quick_gelu", "limit": 0.3, "up_offset": 1.0},
        {"limit": 0.2, "biased": True}, {"up_offset": -0.5}, {"scale_inputs": True, "biased": True},
    ],
)  # fmt: skip
def test_activations_and_biases_of_experts_equal_torch(more: dict[str, Any]) -> None:
    program, source = layer(5, more)
    for got, want in zip(logits(program, source), wanted(program, source), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_quantized_experts_equal_the_same_numbers_in_float(method: str) -> None:
    program, source = layer(1, {"biased": True})
    read = reader_of(source, method)  # type: ignore[arg-type]
    rounded = Arrays(source.arrays)
    for op in program.ops:
        for weight in (w for ws in op.weights().values() for w in ws if w.columns and not isinstance(op, ops.Route)):
            for part in weight.parts:
                whole = Weight((part,), weight.columns, table=weight.table)
                rounded.arrays[part.name] = floats(whole, source, read)
    for got, want in zip(logits(program, source, read=read), wanted(program, rounded), strict=True):
        assert np.abs(got - want).max() < 0.03 * np.abs(want).max()  # activations are int8


def floats(weight: Weight, source: Arrays, read: Any) -> np.ndarray:
    from tokenmill.quant.base import load

    return load(weight, source, read).floats()  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["", "int8"])
def test_a_row_is_the_same_to_the_bit_alone_in_a_batch_and_on_any_number_of_threads(method: str) -> None:
    program, source = layer(2, correction=True)
    read = reader_of(source, method)  # type: ignore[arg-type]
    together = logits(program, source, read=read, cpu_threads=3)
    for got, again in zip(together, logits(program, source, read=read, cpu_threads=1), strict=True):
        np.testing.assert_array_equal(got, again)
    alone = CpuDriver(source, program=program, read=read)  # type: ignore[arg-type]
    np.testing.assert_array_equal(alone.feed([(1, [3, 5, 60])])[0], together[0][1])
    alone.close()


def test_logits_that_are_no_numbers_choose_experts_once_each() -> None:
    """An expert chosen twice would write beyond its rows."""
    program, source = layer(3)
    source.arrays["w0"][7] = np.nan
    got = logits(program, source)
    assert np.isnan(got[1][0]).all()
    assert np.isfinite(got[1][1]).all()


@pytest.mark.parametrize(
    "more, choice, why",
    [
        ({"act": "softsign"}, {}, "activation softsign"),
        ({}, {"groups": 2, "group_best": 3}, "count as 3 scores"),
    ],
)
def test_what_the_kernels_lack_is_refused_by_name(more: dict[str, Any], choice: dict[str, Any], why: str) -> None:
    program, _ = layer(0, more, **choice)
    assert why in refusal(program, 16)
