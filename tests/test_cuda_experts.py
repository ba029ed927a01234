"""Mixtures of experts on the CUDA backend: routing, sorting and products equal torch's, under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support_cuda import DEVICE, ON_GPU, CudaDriver, cuda_job, torch, write_random
from support_models import Driver
from support_programs import VOCABULARY, Arrays, Draw, logits_of, same, steps
from test_cpu_experts import CHOICES, layer

from tokenmill.backends.base import StepLimits
from tokenmill.backends.cuda import expert_products, expert_shapes
from tokenmill.backends.cuda.backend import CudaBackend
from tokenmill.backends.cuda.device import Device
from tokenmill.backends.cuda.expert_shapes import TileShape
from tokenmill.backends.cuda.experts import ExpertLowering
from tokenmill.backends.cuda.memory import Memory
from tokenmill.backends.cuda.pack import pack
from tokenmill.backends.cuda.prepare import refusal
from tokenmill.backends.cuda.shapes import power
from tokenmill.backends.cuda.sizes import Sizes
from tokenmill.backends.torch import pack as torch_pack
from tokenmill.backends.torch.experts import mixed, routed
from tokenmill.backends.torch.kinds import activation
from tokenmill.parallel.group import Group
from tokenmill.program import ops
from tokenmill.program.ops import Weight
from tokenmill.program.value import Inputs, Program, Value, record
from tokenmill.quant.base import Reader, reader_of

torch.set_num_threads(1)
MORE: dict[str, dict[str, Any]] = {
    "bare": {},
    "biased": {"biased": True, "act": "relu"},
    "bounded": {"biased": True, "limit": 0.3, "up_offset": 1.0, "act": "quick_gelu"},
    "scaled inputs": {"biased": True, "scale_inputs": True, "act": "gelu"},
    "without gates": {"biased": True, "gated": False, "act": "relu2"},
}


def tiny(
    seed: int, more: dict[str, Any] | None = None, *, width: int = 32, inner: int = 24, count: int = 5, top_k: int = 2,
    correction: bool = False, **choice: Any,
) -> tuple[Program, Arrays]:  # fmt: skip
    """Return a program of one mixture of experts, cheap to interpret. `more`: of Experts; `choice`: of Route."""
    draw, fields = Draw(seed), {"act": "silu", **(more or {})}
    biased, gated = fields.pop("biased", False), fields.get("gated", True)

    def gate_up(columns: int) -> Weight:
        return Weight(tuple(draw.weight(inner, columns).parts[0] for _ in range(2 if gated else 1)), columns)

    def model(inputs: Inputs) -> Value:
        x = inputs.ids.record(ops.Embed, width, ids=inputs.ids, table=draw.weight(VOCABULARY, width, table=True))
        ids, factors = (x.tape.new(x.spec.rows, top_k, kind) for kind in ("ids", "float"))
        given = {"weight": draw.weight(count, width), "correction": draw.weight(count) if correction else None}
        x.tape.ops.append(ops.Route(out=ids, factors=factors, x=x, top_k=top_k, **given, **choice))
        return x.record(
            ops.Experts, x=x, ids=ids, factors=factors, gate_up=tuple(gate_up(width) for _ in range(count)),
            down=tuple(draw.weight(width, inner) for _ in range(count)),
            gate_up_bias=tuple(gate_up(0) for _ in range(count)) if biased else (),
            down_bias=tuple(draw.weight(width) for _ in range(count)) if biased else (), **fields,
        )  # fmt: skip

    return record(model), draw.source()


class Layer:
    """One mixture of experts, lowered, beside its reference."""

    def __init__(
        self, program: Program, source: Arrays, dtype: Any = torch.float32, *, deterministic: bool = False,
        read: Reader | None = None,
    ) -> None:  # fmt: skip
        device, read = Device(DEVICE), read or reader_of(source)  # type: ignore[arg-type]
        self.memory = Memory(program, StepLimits(64, 4, 64, 16), dtype, device)
        given = program, source, read, Group(), dtype
        self.weights = pack(*given, device)  # type: ignore[arg-type]
        self.lowering = ExpertLowering(self.memory, self.weights, deterministic)
        self.plain = torch_pack.pack(*given, device.torch)  # type: ignore[arg-type]
        (self.route,) = (op for op in program.ops if isinstance(op, ops.Route))
        (self.experts,) = (op for op in program.ops if isinstance(op, ops.Experts))
        self.routing, self.products = self.lowering.route(self.route), self.lowering.experts(self.experts)

    def rows(self, count: int, seed: int = 0) -> Any:
        """Set and return inputs."""
        x = self.memory.value(self.route.x)[:count]
        return x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))

    def chosen(self, count: int) -> tuple[Any, Any]:
        """Return ids and factors."""
        self.routing(Sizes(count, count, torch.zeros(0)))
        return tuple(self.memory.value(v)[:count].clone() for v in (self.route.out, self.route.factors))

    def chosen_by_torch(self, x: Any) -> tuple[Any, Any]:
        optional = self.route.bias, self.route.correction
        bias, correction = (None if w is None else self.plain[w].float() for w in optional)
        logits = torch.nn.functional.linear(x.float(), self.plain[self.route.weight].float(), bias)
        ids, factors = routed(self.route, logits, correction)
        return ids, factors.to(x.dtype)

    def summed(self, count: int, run: Callable[[], object] | None = None) -> Any:
        """Return the result of the products, by the lowering's own choice of launches or by `run`."""
        out = self.memory.value(self.experts.out)
        out.fill_(float("nan"))
        if run is None:
            self.products(Sizes(count, count, torch.zeros(0)))
        else:
            run()
        return out[:count].clone()

    def summed_by_torch(self, x: Any, ids: Any, factors: Any) -> Any:
        return mixed(self.experts, x, ids, factors, self.plain, activation(self.experts.act))


def close(got: Any, want: Any, off: float = 1e-4) -> bool:
    return bool((got.float() - want.float()).abs().max() <= off * want.float().abs().max())


ROUTES = {name: choice for name, choice in CHOICES.items() if "samples" not in choice} | {
    "sparsemixer": {"score": "sparsemixer", "margin": 0.3, "top_k": 2, "correction": True}
}


SOME = ("softmax", "groups of two best", "sparsemixer")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in SOME else pytest.mark.slow) for n in ROUTES])
def test_rows_are_routed_as_torch_routes_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Layer(*layer(1, {}, **dict(ROUTES[name])))
    for count, few in ((1, 256), (18, 256), (18, 4)):
        monkeypatch.setattr(expert_shapes, "_FEW", few)
        x = made.rows(count)
        (ids, factors), (wanted_ids, wanted) = made.chosen(count), made.chosen_by_torch(x)
        assert torch.equal(ids.long(), wanted_ids)
        assert close(factors, wanted)


def test_many_experts_in_groups_that_are_no_powers_of_two_are_routed_as_in_torch() -> None:
    more = {"groups": 3, "top_groups": 2, "group_best": 2, "score": "sigmoid", "correction": True}
    made = Layer(*tiny(0, inner=16, width=16, count=60, top_k=6, **more))  # type: ignore[arg-type]
    for count in (1, 9):
        x = made.rows(count)
        (ids, factors), (wanted_ids, wanted) = made.chosen(count), made.chosen_by_torch(x)
        assert torch.equal(ids.long(), wanted_ids)
        assert close(factors, wanted)


def test_a_row_that_is_no_number_chooses_experts_that_exist_and_leaves_the_others_alone() -> None:
    made = Layer(*tiny(1))
    x = made.rows(3)
    ids, factors = made.chosen(3)
    x[1] = float("nan")
    again, factors_again = made.chosen(3)
    assert ((again >= 0) & (again < 5)).all()
    assert factors_again[1].isnan().all()
    assert torch.equal(again[[0, 2]], ids[[0, 2]])
    assert torch.equal(factors_again[[0, 2]], factors[[0, 2]])
    assert made.summed(3)[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("bounded", "scaled inputs") else pytest.mark.slow) for n in MORE]
)
def test_products_of_the_chosen_experts_equal_torchs(name: str) -> None:
    made = Layer(*tiny(2, MORE[name]))
    for count in (1, 19):
        x = made.rows(count)
        ids, factors = made.chosen(count)
        assert close(made.summed(count), made.summed_by_torch(x, ids.long(), factors))


def test_rows_that_all_choose_the_same_experts_or_one_expert_twice_are_computed() -> None:
    made = Layer(*tiny(2, MORE["biased"]))
    x = made.rows(40)
    ids, factors = (made.memory.value(v)[:40] for v in (made.route.out, made.route.factors))
    for chosen in ([4, 0], [3, 3]):
        ids.copy_(torch.tensor(chosen).expand(40, 2))
        factors.copy_(torch.rand(40, 2, generator=torch.Generator().manual_seed(0)))
        assert close(made.summed(40), made.summed_by_torch(x, ids.long(), factors.clone()))


SHAPES = [TileShape(32, 64, 16, 2, 4, halves=True, group=2), TileShape(16, 16, 64, 1, 4)]


@pytest.mark.parametrize("shape", [SHAPES[0], pytest.param(SHAPES[1], marks=pytest.mark.slow)])
def test_tiles_of_any_size_with_and_without_a_copy_engine_give_the_same_result(shape: TileShape) -> None:
    made = Layer(*tiny(3, MORE["bounded"]), torch.float16)  # type: ignore[arg-type]
    x = made.rows(19)
    ids, factors = made.chosen(19)
    for copies in (True, False) if not ON_GPU else (made.memory.device.copies_tiles,):
        made.memory.device.copies_tiles = copies
        products = made.lowering.products(made.experts)
        got = made.summed(19, lambda products=products: products.run(19, shape, shape, False))
        assert close(got, made.summed_by_torch(x, ids.long(), factors), 2e-2)


def test_pairs_are_sorted_in_segments_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Layer(*tiny(4, top_k=3, count=12))
    made.rows(40)
    ids, _ = made.chosen(40)
    sort = made.lowering.products(made.experts)._sort
    order = ids.flatten().cpu().numpy().argsort(kind="stable")
    made.lowering._scratch.counts, made.lowering._scratch.firsts = (
        torch.zeros(size, dtype=torch.int32, device=DEVICE) for size in (20 * 16, 21 * 16)
    )
    for size in (128, 6):  # one segment; more than are added up at a time
        monkeypatch.setattr(expert_products, "sort_size", lambda pairs, size=size: power(size))
        for tensor in (sort.items, sort.tiles):
            tensor.fill_(-1)
        sort.run(120, 16, False)
        np.testing.assert_array_equal(sort.items[:120].cpu().numpy(), order)
        tiles = sort.tiles.view(-1, 4)[: sort.num_tiles(120, 16), :3].cpu().numpy()
        used = tiles[tiles[:, 2] > 0]
        covered = [first + i for _, first, count in used for i in range(count)]
        assert covered == list(range(120))
        assert all((ids.flatten().cpu().numpy()[order[first : first + count]] == e).all() for e, first, count in used)
        assert (tiles[:, 2] >= 0).all(), "unused tiles are marked at every step"


def test_with_deterministic_a_row_is_the_same_to_the_bit_alone_and_in_a_batch() -> None:
    made = Layer(*tiny(5, MORE["biased"]), deterministic=True)
    together = []
    for count in (40, 1):
        made.rows(40)
        ids, factors = made.chosen(count)
        together.append((ids[:1], factors[:1], made.summed(count)[:1]))
    assert all(torch.equal(a, b) for a, b in zip(*together, strict=True))


class Drawn(CudaDriver):
    """The backend of a program without a checkpoint on disk."""

    def __init__(self, program: Program, source: Arrays) -> None:
        CudaBackend.__init__(self, cuda_job(program, source, StepLimits(64, 4, 64, 16), cuda_graphs=()))
        self.allocate(16)
        self.free = np.random.default_rng(3).permutation(16).tolist()
        self.known, self.tables = {}, {}


def test_a_single_row_is_normed_and_summed_in_the_launches_of_its_experts(tmp_path: Path) -> None:
    write_random(
        tmp_path, "qwen3_moe", num_hidden_layers=2, head_dim=16, num_attention_heads=4, num_key_value_heads=2,
        hidden_size=64, moe_intermediate_size=16, num_experts=4, vocab_size=64, spread=0.2,
    )  # fmt: skip
    dtype, off = ("bfloat16", 5e-2) if ON_GPU else ("float32", 1e-3)  # Products of float32 are cuBLAS's on a GPU.
    backend = CudaDriver(tmp_path, dtype=dtype, limits=StepLimits(16, 2, 64, 16), num_blocks=4)
    fused = [type(launch.op).__name__ for launch in backend._batch_one]
    assert fused[:8] == ["Embed", "Linear", "Attention", "Linear", "Route", "Experts", "Linear", "Attention"]
    assert fused[-3:] == ["Route", "Experts", "Linear"]
    expected = Driver.of(tmp_path)
    got, want = backend.feed([(0, [3])]), expected.feed([(0, [3])])
    assert np.linalg.norm(got - want) < off * np.linalg.norm(want)


def with_experts(count: int) -> list[Draw]:
    """Return draws of programs with experts that the backend does not refuse."""
    found = []
    for seed in range(1000):
        program = Draw(seed).program()
        if any(isinstance(op, ops.Experts) for op in program.ops) and not refusal(program, "float32"):
            found.append(Draw(seed))
        if len(found) == count:
            break
    return found


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_a_drawn_program_with_experts_is_computed_as_by_torch(part: int) -> None:
    draw = with_experts(part + 1)[part]
    program = draw.program()
    want = logits_of(program, draw.source())
    backend = Drawn(program, draw.source())
    got = [backend.feed(rows) for rows in steps()]
    backend.close()
    assert same(got, want, 2e-3), f"{program}\n--- lowered\n{backend.program}"


@pytest.mark.parametrize(
    "more, choice, why",
    [
        ({"act": "tanh"}, {}, "activation tanh"),
        ({}, {"top_k": 17}, "16 experts of a row at most, not 17"),
    ],
)
def test_what_the_kernels_lack_is_refused_by_name(more: dict[str, Any], choice: dict[str, Any], why: str) -> None:
    assert why in refusal(layer(0, more, **choice)[0], "float32")
    assert refusal(layer(0, {"act": "quick_gelu"})[0], "bfloat16") == ""
