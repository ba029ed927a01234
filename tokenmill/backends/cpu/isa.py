"""Instruction sets that the kernels are written for, and which of them this machine has.

Everything that emits code takes an `Isa`; nothing is read from the machine at import. A kernel compiled for one set
never meets one compiled for another, for its name ends with the set's (`ir.kernel`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from llvmlite import binding

from tokenmill.errors import ArgumentError, Unsupported


@dataclass(frozen=True, slots=True)
class Isa:
    """An instruction set: what its products of int8 are made of, and how wide its vectors are."""

    name: str
    lanes: int  # float32 of a register: 16, 8 or 4
    rows: int  # the most rows of a product's tile: what was fastest
    needs: tuple[str, ...]  # LLVM's names of what a CPU must have
    lacks: tuple[str, ...] = ()  # prefixes of features that must not be used when this set is forced
    pairs: bool = False  # whether bfloat16 is multiplied as such, two columns at once


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", *_AVX2)
ALL = (
    Isa("avx512bf16", 16, 8, ("avx512bf16", *_AVX512), pairs=True),  # else the same as the next
    Isa("avx512vnni", 16, 8, _AVX512, ("avx512bf16",)),
    Isa("avxvnni", 8, 4, ("avxvnni", *_AVX2), ("avx512", "evex512")),
    Isa("avx2", 8, 8, _AVX2, ("avx512", "evex512", "avxvnni", "avxvnniint")),
    Isa("neon", 4, 4, ("neon", "dotprod", "fullfp16")),
)
"""Best first."""
_BY_NAME = {isa.name: isa for isa in ALL}


@cache
def features() -> frozenset[str]:
    """LLVM's names of what this machine's CPU has: "avx512bf16", "f16c", "fma" …"""
    return frozenset(name for name, there in binding.get_host_cpu_features().items() if there)


def available() -> tuple[Isa, ...]:
    """The sets that this machine can run, best first; empty on a CPU that the kernels are not written for."""
    return tuple(isa for isa in ALL if features().issuperset(isa.needs))


def detect(forced: str = "") -> Isa:
    """The best set of this machine, or the one that the user names (TOKENMILL_ISA).

    ArgumentError for an unknown name or a set that the machine lacks; Unsupported if there is none for this CPU.
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
    """What to tell LLVM (numba's CPU_FEATURES) so that it uses nothing beyond `isa` in the code around the kernels.

    None: all that the machine has.
    """
    if isa not in available()[1:]:
        return None
    kept = [f for f in sorted(features()) if not f.startswith(isa.lacks)]
    dropped = [f for f in sorted(features()) if f.startswith(isa.lacks)]
    return ",".join([*(f"+{f}" for f in kept), *(f"-{f}" for f in dropped)])
