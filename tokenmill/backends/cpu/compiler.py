"""From a kernel's name to machine code. Needs numba; a start whose kernels are all in the cache never comes here.

A module of kernels has `KERNELS: dict[str, Kernel]` for those whose code is the same for every instruction set, and
`kernels(isa) -> dict[str, Callable[[], Kernel]]` for the others: names to makers, of which only those that a program
names are called. Attention's kernels are for exact sizes, which their names tell (`attention.named`). All take (thread,
address of the row, address of the context, address of the counter), all int64.

What is compiled leaves numba as LLVM's text and becomes an object file of ours with one
symbol, `tokenmill_kernel_<name>`, everything else private to it: so nothing that two kernels share by name can meet.
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
MODULES = ("step", "products", "rows", "rope", "sampling")
PREFIX = "tokenmill_kernel_"

SIGNATURE = types.int64(types.int64, types.int64, types.int64, types.int64)
"""(thread, address of the row, address of the context, address of the counter)"""


def makers(isa: Isa) -> Makers:
    """Every kernel there is for an instruction set."""
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
    """Compile each; `done` gets its name and object file. Takes some tenths of a second a kernel."""
    if (features := target_features(isa)) is not None:
        vars(config)["CPU_FEATURES"] = features  # before numba's first compilation in this process
    vars(config)["OPT"] = type(vars(config)["OPT"])(0)  # else each function is optimized again in all that call it
    attention = import_module("tokenmill.backends.cpu.attention")
    by_name, target = makers(isa), _target(isa)
    for name in names:
        done(name, object_file(name, by_name[name]() if name in by_name else attention.named(name, isa), target))


def object_file(name: str, kernel: Kernel, target: Any) -> bytes:
    """The kernel's machine code, as an object file."""
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
    """LLVM's text of a kernel and all that it calls, not optimized yet."""
    options = {"error_model": "numpy", "nogil": True}
    compiled: Any = ccallback.CFunc(kernel, (SIGNATURE.args, SIGNATURE.return_type), locals={}, options=options)
    with compiler_lock.global_compiler_lock:
        library = compiled._compile_uncached().library
        library.finalize()  # links what the kernel calls
    return str(library.get_llvm_str())


def _target(isa: Isa) -> Any:
    features = target_features(isa) or binding.get_host_cpu_features().flatten()
    target = binding.Target.from_triple(binding.get_process_triple())
    return target.create_target_machine(
        cpu=binding.get_host_cpu_name(), features=features, opt=3, reloc="static", codemodel="jitdefault", jit=True
    )
