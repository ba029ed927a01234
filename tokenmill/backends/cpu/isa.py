"""Instruction sets that kernels are written for, and detection of those that this machine supports.

All code generation takes an `Isa`; importing reads nothing from the machine. The names of functions whose code depends
on the set end with the name of the set (`ir.kernel`), so code for two sets is never mixed up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from llvmlite import binding

from tokenmill.errors import ArgumentError, Unsupported


@dataclass(frozen=True, slots=True)
class Isa:
    """An instruction set: its vector width, int8 dot product and required CPU features."""

    name: str
    lanes: int  # float32 elements of a register: 16, 8 or 4
    rows: int  # maximum rows of a product's tile, chosen by measurement
    needs: tuple[str, ...]  # required CPU features, by LLVM's names
    lacks: tuple[str, ...] = ()  # prefixes of features to disable when this set is forced
    pairs: bool = False  # True: bfloat16 dot products of two columns at once


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", *_AVX2)
ALL = (
    Isa("avx512bf16", 16, 8, ("avx512bf16", *_AVX512), pairs=True),  # otherwise the same as avx512vnni
    Isa("avx512vnni", 16, 8, _AVX512, ("avx512bf16",)),
    Isa("avxvnni", 8, 4, ("avxvnni", *_AVX2), ("avx512", "evex512")),
    Isa("avx2", 8, 8, _AVX2, ("avx512", "evex512", "avxvnni", "avxvnniint")),
    Isa("neon", 4, 4, ("neon", "dotprod", "fullfp16")),
)
"""All instruction sets, best first"""
_BY_NAME = {isa.name: isa for isa in ALL}


@cache
def features() -> frozenset[str]:
    """Return the features of this machine's CPU by LLVM's names: "avx512bf16", "f16c", "fma" …"""
    return frozenset(name for name, there in binding.get_host_cpu_features().items() if there)


def available() -> tuple[Isa, ...]:
    """Return the sets that this machine supports, best first; empty on a CPU without kernels."""
    return tuple(isa for isa in ALL if features().issuperset(isa.needs))


def detect(forced: str = "") -> Isa:
    """Return the best set of this machine, or the one that the user forces (TOKENMILL_ISA).

    Raises ArgumentError if the forced set is unknown or not supported by this machine, Unsupported if no set is.
    """
    here = available()
    if not forced:
        if here:
            return here[0]
        cpu = binding.get_host_cpu_name() or "unknown"
        raise Unsupported("CPU", cpu, (" and ".join(isa.needs) for isa in ALL), "Use --backend torch on this machine.")
    isa = _BY_NAME.get(forced)
    names = ", ".join(i.name for i in here) or "none"
    if isa is None:
        raise ArgumentError(
            f"TOKENMILL_ISA={forced!r} is no instruction set that is known. Known: {', '.join(_BY_NAME)}; "
            f"this machine has: {names}. Leave it out to get the best."
        )
    if isa not in here:
        missing = ", ".join(sorted(set(isa.needs) - features()))
        raise ArgumentError(
            f"TOKENMILL_ISA={forced} needs a CPU with {missing}, which this machine lacks. It has: {names}. "
            "Leave TOKENMILL_ISA out to get the best."
        )
    return isa


def target_features(isa: Isa) -> str | None:
    """Return LLVM's feature string (numba's CPU_FEATURES) that limits generated code to `isa`.

    None: `isa` is the best set, so all features of the machine may be used.
    """
    if isa not in available()[1:]:
        return None
    kept = [f for f in sorted(features()) if not f.startswith(isa.lacks)]
    dropped = [f for f in sorted(features()) if f.startswith(isa.lacks)]
    return ",".join([*(f"+{f}" for f in kept), *(f"-{f}" for f in dropped)])
