"""The CUDA backend on a GPU: models of real shapes in half precision, through graphs; and the engine with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support_cuda import ON_GPU, CudaDriver, torch, write_random
from support_models import Driver

from tokenmill.backends.base import StepLimits
from tokenmill.backends.kind import BackendOptions
from tokenmill.models.base import program_of
from tokenmill.parallel.group import Group
from tokenmill.runtime.assembly import EngineOptions, assemble
from tokenmill.runtime.offline import OfflineEngine
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source
from tokenmill.wire.messages import SamplingParams, StoppingParams

pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


@pytest.mark.parametrize("heads, kv_heads, head_dim", [(32, 8, 64), (28, 4, 128), (9, 3, 64), (8, 8, 80)])
def test_models_of_real_shape_in_half_precision_through_graphs(
    heads: int, kv_heads: int, head_dim: int, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "vocab_size": 8192}
    write_random(
        tmp_path, "qwen2", dtype=torch.bfloat16, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=head_dim, max_position_embeddings=4096, spread=0.04, **sizes,
    )  # fmt: skip
    limits = StepLimits(4096, 70, 4096, 16)
    driver = CudaDriver(tmp_path, dtype="bfloat16", limits=limits, num_blocks=2048, warm=True, graphs=None)
    source = open_checkpoint(local_source(tmp_path))
    expected = Driver(program_of(source.config), source, limits=limits, num_blocks=2048)
    rng = np.random.default_rng(0)

    def ids(n: int) -> list[int]:
        return rng.integers(0, 8192, n).tolist()

    history = [[(0, ids(2500)), (1, ids(70))], [(0, ids(1))], [(1, ids(1)), (0, ids(1))]]
    history += [[(i, ids(i)) for i in range(2, 70)], [(i, ids(1)) for i in range(70)], [(i, ids(1)) for i in range(40)]]
    history += [[(0, ids(1)), (1, ids(300)), (2, ids(1)), (3, ids(5))], [(i, ids(1)) for i in range(9)]]
    for rows in history:
        wanted, made = expected.feed(rows), driver.feed(rows)
        off = np.linalg.norm(made - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
        assert off.max() < 2e-2, (len(rows), off.argmax(), off.max(), np.median(off))


def test_where_there_is_a_gpu_it_serves(tmp_path: Path) -> None:
    write_random(tmp_path, "llama", dtype=torch.float16, torch_dtype="float16")
    wants = EngineOptions(backend=BackendOptions(cuda_memory_fraction=0.1, cuda_graphs=(1, 4)), max_batch_size=8)
    with OfflineEngine(assemble(local_source(tmp_path), wants, Group(), lambda progress: None)) as engine:
        info = engine.info
        assert (info.backend, info.device, info.dtype) == ("cuda", "cuda", "float16")
        assert info.num_blocks == 8 * 256 // 16
        params = SamplingParams(temperature=0.8, top_p=0.9, seed=4)
        alone = [engine.generate([[1, 2, i]], params, StoppingParams(20))[0] for i in range(6)]
        assert engine.generate([[1, 2, i] for i in range(6)], params, StoppingParams(20)) == alone
