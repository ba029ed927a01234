"""Kernels are compiled by helper processes before the first step, and found by the launches that follow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support_cuda import ON_GPU, write_random

from tokenmill.backends.cuda import compile as compiling
from tokenmill.backends.cuda.compile import Kernels

ROOT = Path(__file__).resolve().parent.parent
USED_BY_LAUNCHERS = (
    "cuCtxGetCurrent", "cuCtxSetCurrent", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuFuncSetAttribute",
    "cuGetErrorString", "cuPointerGetAttribute",
)  # fmt: skip

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="Triton needs a C compiler")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Run tests/compile_kernels.py and return its results."""
    folder, cache = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("cache")
    write_random(folder, "llama", num_hidden_layers=1, hidden_size=64, intermediate_size=96)
    library = tmp_path_factory.mktemp("library")
    if not ON_GPU:  # a compiler that links launchers
        code = "".join(f"void {name}(void) {{}}\n" for name in USED_BY_LAUNCHERS)
        build = ["cc", "-shared", "-fPIC", "-o", str(library / "libcuda.so.1"), "-xc", "-"]
        subprocess.run(build, input=code, text=True, check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment["PYTHONPATH"] = str(ROOT)
    if not ON_GPU:
        environment |= {"TRITON_LIBCUDA_PATH": str(library), "LD_LIBRARY_PATH": str(library)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "compile_kernels.py"), str(folder), str(cache), "2"],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(**json.loads(done.stdout), folder=cache, log=done.stderr)


@pytest.mark.slow
def test_what_helpers_compiled_is_found_by_the_launch(start: SimpleNamespace) -> None:
    assert {"embed_rows", "norm_rows", "decode", "choose"} <= set(start.hits)
    assert not start.misses
    assert Path(start.cache) == start.folder / "triton"
    assert len(start.told) == start.told[-1][1] >= len(start.hits)
    assert [done for done, _ in start.told] == list(range(len(start.told)))
    assert f"{len(start.told)} kernels were compiled" in start.log


@pytest.mark.slow
def test_a_start_like_an_earlier_one_starts_no_helpers(start: SimpleNamespace) -> None:
    assert start.started == [True, True, False, True, False]


@pytest.mark.slow
def test_a_kernel_that_is_compiled_in_a_step_is_told_once(start: SimpleNamespace) -> None:
    told = [line for line in start.log.splitlines() if "A step waits for a kernel" in line]
    assert told
    assert len({line.split("[")[0] for line in told}) == len(told)
    assert any("decode" in line for line in told)


@pytest.mark.slow
def test_helpers_that_fail_or_die_are_reported(start: SimpleNamespace) -> None:
    ((name, error),) = start.broken
    assert name == "nothing_of_this_name"
    assert "AttributeError" in error
    ((_, why),) = start.dead
    assert why


def test_where_kernels_are_interpreted_nothing_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Kernels("", 4, ())
    kernels.prepare(lambda: pytest.fail("there is nothing to note"))
    kernels.watch()
    kernels.close()
    monkeypatch.setattr("triton.knobs", None, raising=False)
    assert compiling._hooks() is None


def test_a_cache_that_cannot_be_written_to_is_told_and_tritons_own_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = tmp_path / "own"
    cache: Any = SimpleNamespace(dir=str(own), get_triton_dir=lambda name: str(own))
    monkeypatch.setattr("triton.knobs", SimpleNamespace(cache=cache), raising=False)
    (tmp_path / "file").touch()
    assert compiling._use(str(tmp_path / "file")) == own
    assert "cannot be written to" in caplog.text
    assert compiling._use(str(tmp_path / "there")) == tmp_path / "there" / "triton"
    assert compiling._use(str(tmp_path / "other")) == tmp_path / "there" / "triton", "what the environment named stays"
