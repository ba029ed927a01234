"""The on-disk cache of compiled kernels: object files in a user folder, loaded into this process.

The folder's name is a hash of the library versions, CPU and instruction set; a file's name contains a hash of the
modules that emit its kernel. So no stale kernel is ever loaded, an edit recompiles only the kernels that it can change,
and machines may share a home folder. Missing kernels are compiled before the server is ready (`compiler.py`, some
seconds for a model), in several processes if there are cores.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from llvmlite import binding

from tokenmill.backends.cpu.isa import Isa, detect
from tokenmill.errors import StartError

_log = logging.getLogger(__name__)
_LIBRARIES = ("numba", "llvmlite")
_EMITTERS = {
    "walk": "step", "serve": "step", "linear": "products", "embed": "products", "narrow": "products", "cos": "rope",
    "rope": "rope", "latent": "rope", "heads": "products", "sample": "sampling", "write": "attention",
    "attend": "attention", "ordered": "ordered_rows",
    **dict.fromkeys(("route", "sort", "spread", "experts", "combine"), "experts"),
    **dict.fromkeys(("conv", "scan", "delta", "lru"), "recurrence"),
    **dict.fromkeys(("meet", "sum", "gather", "moments", "share"), "collective_rows"),
    **dict.fromkeys(("clip", "magnitude", "sparsify", "mix", "correct", "factors"), "special_rows"),
}  # fmt: skip
"""Kernels whose names begin with this word, and the module that emits them; `rows` emits all others."""

_NEVER_CALLED = (
    "numba_gil_ensure", "numba_gil_release", "numba_do_raise", "numba_unpickle", "numba_runtime_build_excinfo_struct",
    "NRT_Free", "NRT_MemInfo_call_dtor",
)  # fmt: skip
"""Functions of numba that raise exceptions. Kernels raise none, but their object files refer to these symbols."""

_COMPILE_S = {"sample": 4.0, "attend": 1.5, "linear": 1.0, "experts": 1.0, "norm": 0.6}
_MOST_JOBS = 4
_ADVICE = "Name another folder with --kernel-cache."

Report = Callable[[int, int], None]
"""(kernels compiled so far, kernels to compile)"""


def cache_folder(given: str) -> Path:
    """Return the folder of the user's option; "": one in the user's cache."""
    return Path(given) if given else Path.home() / ".cache" / "tokenmill" / "kernels"


class KernelCache:
    """The cached kernels of one instruction set.

    `folder`: parent of the cache folder. If it is not writable, a warning is logged and kernels are compiled at every
    start. `jobs`: maximum number of compiling processes.
    """

    def __init__(self, folder: Path, isa: Isa, jobs: int = 1) -> None:
        self.isa, self.folder, self._jobs = isa, folder / f"{isa.name}-{_machine_key(isa)}", jobs
        self._files: dict[str, Path] = {}

    def load(self, names: Iterable[str], report: Report | None = None) -> Code:
        """Load kernels into this process; compile missing ones first."""
        wanted = list(dict.fromkeys(names))
        objects = {name: data for name in wanted if (data := self._read(name)) is not None}
        if missing := [name for name in wanted if name not in objects]:
            objects |= self._compile(missing, report)
        return Code([(name, objects[name]) for name in wanted])

    def fill(self, names: Iterable[str], report: Report | None = None) -> int:
        """Compile the missing kernels and return their number. Raises StartError if the folder is not writable."""
        missing = self.missing(names)
        if missing and (why := self._make_folder()):
            raise StartError(f"The kernel cache {self.folder} cannot be written to: {why}. {_ADVICE}")
        if missing:
            self._compile(missing, report)
        return len(missing)

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return the names that are not in the cache."""
        return [name for name in dict.fromkeys(names) if not self.file(name).is_file()]

    def file(self, name: str) -> Path:
        """Return the path of a kernel's object file, which may not exist."""
        if name not in self._files:
            self._files[name] = self.folder / f"{name}-{source_key(emitter(name))}.o"
        return self._files[name]

    def _compile(self, names: list[str], report: Report | None) -> dict[str, bytes]:
        """Compile kernels and return their object files.

        Helper processes compile them into the folder, so that numba's memory is freed when they exit. This process
        compiles the rest: all of them if the folder is not writable.
        """
        made: dict[str, bytes] = {}
        why = self._make_folder()
        writable = not why
        if why:
            _log.warning(
                "The kernel cache %s cannot be written to (%s): kernels are compiled at every start. %s",
                self.folder, why, _ADVICE,
            )  # fmt: skip
        shares = _balanced_shares(names, self._jobs) if writable else []

        def report_progress() -> None:
            if report is not None:
                report(len(names) - len(self.missing(names)) if writable else len(made), len(names))

        def done(name: str, data: bytes) -> None:
            made[name] = data
            report_progress()

        report_progress()
        with contextlib.ExitStack() as helpers:
            started = [helpers.enter_context(_helper(self.folder, self.isa, share)) for share in shares]
            while self.missing(names) and any(helper.poll() is None for helper in started):
                time.sleep(0.05)
                report_progress()
        made |= {name: data for name in names if (data := self._read(name)) is not None}
        if remaining := [name for name in names if name not in made]:
            from tokenmill.backends.cpu.compiler import compile_kernels

            compile_kernels(remaining, self.isa, done)
        return made

    def _read(self, name: str) -> bytes | None:
        try:
            return self.file(name).read_bytes()
        except OSError:
            return None

    def _make_folder(self) -> str:
        """Create the folder. Returns the reason why it is not writable; "" if it is."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                return ""
        except OSError as e:
            return e.strerror or str(e)

    def write(self, name: str, data: bytes) -> None:
        """Write a kernel to the cache, atomically because other processes may be reading."""
        with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
            file.write(data)
        Path(file.name).replace(self.file(name))


class Code:
    """Machine code loaded into this process, by kernel name. Keep this object alive while an address is in use."""

    def __init__(self, objects: list[tuple[str, bytes]]) -> None:
        self._engine = _engine()
        for _, data in objects:
            self._engine.add_object_file(binding.ObjectFileRef.from_data(data))
        self._engine.finalize_object()
        self.addresses: dict[str, int] = {
            name: self._engine.get_function_address(f"tokenmill_kernel_{name}") for name, _ in objects
        }

    def __getitem__(self, name: str) -> int:
        """Return a kernel's address."""
        return self.addresses[name]

    def function(self, name: str) -> Callable[[int, int, int, int], int]:
        """Return a kernel as a Python callable, which releases the global interpreter lock during the call."""
        return ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 4)(self.addresses[name])


def _balanced_shares(names: list[str], jobs: int) -> list[list[str]]:
    """Divide kernels among processes so that all take about the same time."""
    shares: list[list[str]] = [[] for _ in range(max(1, min(jobs, _MOST_JOBS, len(names))))]
    spent = [0.0] * len(shares)
    for name in sorted(names, key=_cost, reverse=True):
        least = spent.index(min(spent))
        shares[least].append(name)
        spent[least] += _cost(name)
    return shares


def _cost(name: str) -> float:
    """Estimate the compile time of a kernel in seconds."""
    return next((seconds for kind, seconds in _COMPILE_S.items() if name.startswith(kind)), 0.3)


def _helper(folder: Path, isa: Isa, names: list[str]) -> subprocess.Popen[bytes]:
    """Start a process that compiles kernels into the folder."""
    module = "tokenmill.backends.cpu.cache"
    arguments = [
        sys.executable,
        "-m",
        "tokenmill.parent",
        str(os.getpid()),
        module,
        str(folder.parent),
        isa.name,
        *names,
    ]
    return subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _engine() -> Any:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    stub = ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p).value
    for symbol in _NEVER_CALLED:
        if binding.address_of_symbol(symbol) is None:
            binding.add_symbol(symbol, stub)
    target = binding.Target.from_triple(binding.get_process_triple())
    machine = target.create_target_machine(codemodel="jitdefault", jit=True)
    return binding.create_mcjit_compiler(binding.parse_assembly(""), machine)


def emitter(name: str) -> str:
    """Return the module of this package that emits a kernel."""
    return _EMITTERS.get(name.partition("_")[0], "rows")


@functools.cache
def source_key(module: str) -> str:
    """Hash the sources that a module's kernels depend on."""
    digest = hashlib.sha256()
    for name in sources(module):
        digest.update(f"{name}\0{_source(name)}".encode())
    return digest.hexdigest()[:16]


def sources(module: str) -> list[str]:
    """Return the compiler, a module of this package and all modules of `tokenmill.backends` that they import."""
    seen, remaining = set[str](), ["cpu.compiler", f"cpu.{module}"]
    while remaining:
        name = remaining.pop()
        if name not in seen and _source(name):
            seen.add(name)
            remaining += _imports(_source(name))
    return sorted(seen)


@functools.cache
def _source(module: str) -> str:
    path = Path(__file__).parents[1].joinpath(*module.split(".")).with_suffix(".py")
    return path.read_text() if path.is_file() else ""


def _imports(source: str) -> set[str]:
    """Return what a source imports from `tokenmill.backends`: modules, and names that are none."""
    found = set[str]()
    for package, names in re.findall(r"^ *from tokenmill\.backends(\.[\w.]+)? import (.+)$", source, re.MULTILINE):
        found |= {package[1:], *(f"{package}.{name}"[1:] for name in re.findall(r"\w+", names))}
    return found


def _machine_key(isa: Isa) -> str:
    """Hash what all kernels of an instruction set depend on: the libraries and this CPU."""
    libraries = [f"{library} {importlib.metadata.version(library)}" for library in _LIBRARIES]
    features = binding.get_host_cpu_features().flatten()
    return hashlib.sha256(repr((libraries, isa.name, binding.get_host_cpu_name(), features)).encode()).hexdigest()[:16]


def main(arguments: list[str]) -> None:
    """Run a helper process: compile kernels of an instruction set into a folder."""
    from tokenmill.backends.cpu.compiler import compile_kernels

    folder, isa, *names = arguments
    cache = KernelCache(Path(folder), detect(isa))
    compile_kernels(names, cache.isa, cache.write)
    os._exit(0)  # skips the interpreter's slow shutdown, because the parent waits for this process


if __name__ == "__main__":
    main(sys.argv[1:])
