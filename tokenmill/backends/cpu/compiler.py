"""Compilation of kernels, by name, to object files. Needs numba: imported only if a kernel is missing from the cache.

A kernel module defines `KERNELS: dict[str, Kernel]` for kernels with the same source for every instruction set, and
`kernels(isa) -> dict[str, Callable[[], Kernel]]` for the others. The latter maps names to makers, and only the makers
of the requested kernels are called. Attention kernels are specialized for the sizes in their names (`attention.named`).
All kernels take (thread, address of the row, address of the context, address of the counter), all int64.

numba's LLVM text becomes an object file with one external symbol, `tokenmill_kernel_<name>`. All its other symbols are
internal, so equal names in two kernels cannot collide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from typing import Any

from llvmlite import binding
from numba import types
from numba.core import ccallback, compiler_lock, config

from tokenmill.backends.cpu.isa import Isa, target_features

Kernel = Callable[..., int]
Makers = dict[str, Callable[[], Kernel]]
MODULES = (
    "step", "products", "experts", "rows", "rope", "recurrence", "special_rows", "ordered_rows", "collective_rows",
    "sampling",
)  # fmt: skip
PREFIX = "tokenmill_kernel_"

SIGNATURE = types.int64(types.int64, types.int64, types.int64, types.int64)
"""(thread, address of the row, address of the context, address of the counter)"""


def makers(isa: Isa) -> Makers:
    """Return the makers of all kernels for an instruction set, except attention's."""
    by_name: Makers = {}
    for name in MODULES:
        module = import_module(f"tokenmill.backends.cpu.{name}")
        for kernel_name, kernel in getattr(module, "KERNELS", {}).items():
            by_name[kernel_name] = partial(_itself, kernel)
        if hasattr(module, "kernels"):
            by_name |= module.kernels(isa)
    return by_name


def _itself(kernel: Kernel) -> Kernel:
    return kernel


def compile_kernels(names: Iterable[str], isa: Isa, done: Callable[[str, bytes], None]) -> None:
    """Compile kernels and pass the name and object file of each to `done`. Takes some tenths of a second a kernel."""
    if (features := target_features(isa)) is not None:
        vars(config)["CPU_FEATURES"] = features  # must precede numba's first compilation in this process
    vars(config)["OPT"] = type(vars(config)["OPT"])(0)  # else a function is optimized again in each of its callers
    attention = import_module("tokenmill.backends.cpu.attention")
    by_name, target = makers(isa), _target(isa)
    for name in names:
        done(name, object_file(name, by_name[name]() if name in by_name else attention.named(name, isa), target))


def object_file(name: str, kernel: Kernel, target: Any) -> bytes:
    """Return the machine code of a kernel as an object file."""
    module = binding.parse_assembly(_llvm(kernel))
    for function in module.functions:
        if not function.is_declaration:
            entry = function.name.startswith("cfunc.")
            function.linkage = "external" if entry else "internal"
            if entry:
                function.name = PREFIX + name
    for variable in module.global_variables:
        if not variable.is_declaration:
            variable.linkage = "internal"
    options = binding.PipelineTuningOptions(speed_level=3)
    options.loop_vectorization = True
    passes = binding.create_pass_builder(target, options)
    passes.getModulePassManager().run(module, passes)
    return bytes(target.emit_object(module))


def _llvm(kernel: Kernel) -> str:
    """Return the LLVM text of a kernel and all functions that it calls, before optimization."""
    options = {"error_model": "numpy", "nogil": True}
    compiled: Any = ccallback.CFunc(kernel, (SIGNATURE.args, SIGNATURE.return_type), locals={}, options=options)
    with compiler_lock.global_compiler_lock:
        library = compiled._compile_uncached().library
        library.finalize()  # links the functions that the kernel calls
    return str(library.get_llvm_str())


def _target(isa: Isa) -> Any:
    features = target_features(isa) or binding.get_host_cpu_features().flatten()
    target = binding.Target.from_triple(binding.get_process_triple())
    return target.create_target_machine(
        cpu=binding.get_host_cpu_name(), features=features, opt=3, reloc="static", codemodel="jitdefault", jit=True
    )
