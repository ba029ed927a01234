"""Driver for the CUDA backend without a GPU, under Triton's interpreter. Import it before any kernel."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before triton is imported
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def patched(tensor: Any, scope: Any, patch: Any = interpreter._patch_lang_tensor) -> None:
        """Work around Triton 3.6's range() over arrays of one element, which numpy 2.4 refuses."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched

    def rounded(x: Any, kind: Any, to: Any, mode: Any, convert: Any = interpreter._convert_float) -> Any:
        """Work around Triton 3.6's lost carry when rounding to 8 bits, and its lack of e4m3's NaN when widening."""
        if str(kind) == "fp8e4nv" and str(to) == "fp16":
            wide = torch.from_numpy(x.copy()).view(torch.float8_e4m3fn).half()
            return wide.numpy().view(np.uint16).reshape(x.shape)
        made = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}.get(str(to))
        if made is None or str(kind) != "fp32":
            return convert(x, kind, to, mode)
        return torch.from_numpy(x.view(np.float32)).to(made).view(torch.uint8).numpy().reshape(x.shape)

    interpreter._convert_float = rounded

    # Skip work that takes most of the interpreter's time without an effect on results: it patches the functions of
    # its language at every call, computes overflow checks that are not reported, and rebuilds a table at each lookup.
    language = pytest.importorskip("triton.language")
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": language, "core": language.core}))
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)

    def numpy_type(kind: Any, known: dict[str, Any] = {}, find: Any = interpreter._get_np_dtype) -> Any:  # noqa: B006
        if kind.name not in known:
            known[kind.name] = find(kind)
        return known[kind.name]

    interpreter._get_np_dtype = numpy_type
else:
    pytest.importorskip("triton")

from safetensors.torch import save_file  # noqa: E402
from support_jobs import job_of  # noqa: E402
from support_models import FAMILIES, SIZES, Driver  # noqa: E402

from bench.gpu.tensors import shapes_of  # noqa: E402
from tokenmill.backends.base import StepLimits  # noqa: E402
from tokenmill.backends.cuda.backend import CudaBackend  # noqa: E402
from tokenmill.backends.kind import Job  # noqa: E402
from tokenmill.models.base import program_of  # noqa: E402
from tokenmill.program import ops  # noqa: E402
from tokenmill.program.cost import weights_of  # noqa: E402
from tokenmill.program.value import Program  # noqa: E402
from tokenmill.quant.base import reader_of  # noqa: E402
from tokenmill.weights.checkpoint import open_checkpoint  # noqa: E402
from tokenmill.weights.source import local_source  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"


def write_random(folder: Path, family: str, *, dtype: Any = torch.float32, spread: float = 0.2, **changes: Any) -> None:
    """Write a tiny random checkpoint of a family. Needs no transformers."""
    model_type, own = FAMILIES[family]
    config = SIZES | {"model_type": model_type} | own | changes
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    draw, program = torch.Generator().manual_seed(0), program_of(config)
    vectors = {part.name for weight in weights_of(program) for part in weight.parts if not weight.columns}
    made = {
        name: (torch.randn(shape, generator=draw) * spread + (0.5 if name in vectors else 0.0)).to(dtype)
        for name, shape in shapes_of(program).items()
    }
    save_file(made, folder / "model.safetensors")


def altered(program: Program, **fields: Any) -> Program:
    """Return the program with changed attention attributes, which no family here uses."""
    changed = tuple(replace(op, **fields) if isinstance(op, ops.Attention) else op for op in program.ops)
    return replace(program, ops=changed)


def program(folder: Path, family: str = "llama", **changes: Any) -> Program:
    """Return the program of a tiny random checkpoint, written to `folder`."""
    write_random(folder, family, **{"num_hidden_layers": 2} | changes)
    return program_of(open_checkpoint(local_source(folder)).config)


def cuda_job(program: Program, source: Any, limits: StepLimits, dtype: str = "float32", **options: Any) -> Job:
    """A CUDA backend's; `options`: of BackendOptions."""
    return job_of(program, source, limits, dtype=dtype, device=DEVICE, **options)


class CudaDriver(CudaBackend):
    """Driver like `support_models.Driver`: fed with ids by slot, blocks scattered over the cache."""

    known: dict[int, list[int]]

    def __init__(
        self, folder: str | Path, *, dtype: str = "float32", num_blocks: int = 64, limits: StepLimits | None = None,
        warm: bool = False, graphs: tuple[int, ...] | None = (), kv_cache_dtype: str = "", scale: float = 1.0,
        deterministic: bool = False, quantize: str = "", group: Any = None,
        source: Any = None, expert_parallel: bool = False, **attention: Any,
    ) -> None:  # fmt: skip
        source = source or open_checkpoint(local_source(folder))
        limits = limits or StepLimits(256, 4, 256, 16)
        program = altered(program_of(source.config), **attention)
        super().__init__(
            cuda_job(
                program, source, limits, dtype, cuda_graphs=graphs, kv_cache_dtype=kv_cache_dtype,
                deterministic=deterministic, quantize=quantize, read=reader_of(source, quantize), group=group,
                expert_parallel=expert_parallel,
            )
        )  # fmt: skip
        if kv_cache_dtype:
            self._attention.scales.update(dict.fromkeys(range(8), (scale, scale)))
        self.allocate(num_blocks)
        self.free = np.random.default_rng(3).permutation(num_blocks).tolist()
        self.known, self.tables = {}, {}
        if warm:
            self.warm_up()

    inputs = Driver.inputs

    def feed(self, rows: list[tuple[int, list[int]]]) -> np.ndarray:
        """Run a step and return the logits of each row's last token, (rows, vocabulary).

        Assert that its sampled tokens are the likeliest ones. Ranks other than 0 may have no logits.
        """
        token_ids = self.run(self.inputs(rows)).result().token_ids  # type: ignore[arg-type]
        logits = self.logits[: len(rows)].float().cpu().numpy().copy()
        self.token_ids = token_ids
        assert self.group.rank or token_ids == logits.argmax(-1).tolist()
        return logits
