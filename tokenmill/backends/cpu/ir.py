"""Generation of LLVM vector code from Python, used by all kernels of this backend.

There are three layers. `Emitter` wraps llvmlite's builder with loads, stores, loops and vector arithmetic; addresses
are int64. `emit` turns a function that generates code with an `Emitter` into an operation that compiled Python can
call. `compiled` and `kernel` compile Python functions around such operations with numba. A `kernel` can be called from
a step table.

Invariant: every compiled function has a unique name. numba looks functions up by name, so two kernels with inner
functions of the same name could call each other's code. The kernel cache is keyed by a hash of the sources
(`cache.py`), because neither generated code nor the globals of a function show in their bytecode.
"""

from __future__ import annotations

import inspect
import types as python
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

Val = Any
"""An LLVM value. llvmlite is untyped, so it is Any for type checkers."""
F = TypeVar("F", bound=Callable[..., Any])

i1, i8, i16, i32, i64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
f16, f32, void = ir.HalfType(), ir.FloatType(), ir.VoidType()
Vector = ir.VectorType
f32x16, i32x16, f16x16 = Vector(f32, 16), Vector(i32, 16), Vector(f16, 16)
"""Vectors have 16 lanes on every machine; LLVM splits them for narrower registers."""


class Emitter:
    """An llvmlite builder (`b`) with the operations that kernels need. Addresses and offsets are int64, in bytes."""

    def __init__(self, builder: Val) -> None:
        self.b = builder

    # ---- constants and addresses ----

    def c(self, v: int) -> Val:
        """Make an int64 constant."""
        return ir.Constant(i64, v)

    def f(self, v: float) -> Val:
        """Make a float32 constant."""
        return ir.Constant(f32, float(v))

    def k(self, ty: Val, v: float) -> Val:
        """Make a constant of a scalar or vector type, equal in all lanes."""
        return ir.Constant(ty, [v] * ty.count) if isinstance(ty, Vector) else ir.Constant(ty, v)

    def at(self, base: Val, offset: Val | int = 0) -> Val:
        """Add an offset to an address."""
        return self.b.add(base, self.c(offset) if isinstance(offset, int) else offset)

    def ptr(self, ty: Val, address: Val) -> Val:
        """Convert an address to a pointer to `ty`."""
        return self.b.inttoptr(address, ty.as_pointer())

    def ld(self, ty: Val, address: Val, offset: Val | int = 0) -> Val:
        """Load a value. The address may have any alignment."""
        loaded = self.b.load(self.ptr(ty, self.at(address, offset)))
        loaded.align = 1
        return loaded

    def st(self, v: Val, address: Val, offset: Val | int = 0) -> None:
        """Store a value. The address may have any alignment."""
        self.b.store(v, self.ptr(v.type, self.at(address, offset))).align = 1

    def vec(self, x: Val, i: Val, offset: int = 0) -> Val:
        """Load vector i (16 float32) of the row at x."""
        return self.ld(f32x16, self.at(x, self.b.mul(i, self.c(64))), offset)

    def put(self, v: Val, x: Val, i: Val) -> None:
        """Store vector i of the row at x."""
        self.st(v, self.at(x, self.b.mul(i, self.c(64))))

    def half(self, address: Val, offset: int = 0, lanes: int = 16) -> Val:
        """Load float16 and convert them to float32."""
        return self.b.fpext(self.ld(Vector(f16, lanes), address, offset), Vector(f32, lanes))

    def prefetch(self, address: Val, offset: Val | int = 0) -> None:
        """Prefetch a cache line for reading. Any address is allowed."""
        pointer = i8.as_pointer()
        f = self._function("llvm.prefetch.p0", void, [pointer, i32, i32, i32])
        read, near, data = (ir.Constant(i32, v) for v in (0, 3, 1))
        self.b.call(f, [self.b.inttoptr(self.at(address, offset), pointer), read, near, data])

    # ---- calls ----

    def _function(self, name: str, result: Val, arguments: Sequence[Val]) -> Val:
        insert: Any = cgutils.get_or_insert_function
        return insert(self.b.module, ir.FunctionType(result, arguments), name)

    def call(self, name: str, result: Val, arguments: Sequence[Val], fast: bool = False) -> Val:
        """Call an LLVM intrinsic or a libc function by name. `fast`: with fast-math flags."""
        f = self._function(name, result, [a.type for a in arguments])
        return self.b.call(f, list(arguments), fastmath=("fast",)) if fast else self.b.call(f, list(arguments))

    def each_lane(self, name: str, *args: Val) -> Val:
        """Call the LLVM intrinsic `name` (sqrt, fabs, maxnum …) whose arguments and result share one type."""
        ty = args[0].type
        kind = f"v{ty.count}f32" if isinstance(ty, Vector) else "f32"
        return self.call(f"llvm.{name}.{kind}", ty, args)

    # ---- lanes ----

    def splat(self, v: Val, lanes: int = 16) -> Val:
        """Broadcast a scalar to all lanes."""
        nothing = ir.Constant(Vector(v.type, lanes), ir.Undefined)
        one = self.b.insert_element(nothing, v, ir.Constant(i32, 0))
        return self.b.shuffle_vector(one, nothing, ir.Constant(Vector(i32, lanes), [0] * lanes))

    def first(self, v: Val) -> Val:
        """Extract lane 0."""
        return self.b.extract_element(v, ir.Constant(i32, 0))

    def lanes(self, ty: Val = i32x16) -> Val:
        """Make the vector 0, 1, 2 …"""
        return ir.Constant(ty, list(range(ty.count)))

    def fma(self, a: Val, b: Val, c: Val) -> Val:
        """Emit a · b + c with one rounding."""
        return self.each_lane("fma", a, b, c)

    def vmax(self, a: Val, b: Val) -> Val:
        """Emit the lane-wise maximum; of a number and a NaN, the number."""
        return self.each_lane("maxnum", a, b)

    def vmin(self, a: Val, b: Val) -> Val:
        """Emit the lane-wise minimum; of a number and a NaN, the number."""
        return self.each_lane("minnum", a, b)

    def rsum(self, v: Val) -> Val:
        """Sum the lanes of a float vector by adding halves. Invariant: the order is the same on every machine."""
        b, count = self.b, v.type.count
        while count > 2:
            count //= 2
            low, high = (
                b.shuffle_vector(v, v, ir.Constant(Vector(i32, count), list(range(start, start + count))))
                for start in (0, count)
            )
            v = b.fadd(low, high)
        first, second = (b.extract_element(v, ir.Constant(i32, i)) for i in range(2))
        return b.fadd(first, second)

    def rmax(self, v: Val) -> Val:
        """Return the largest lane of a float vector without NaN or infinities."""
        return self.call(f"llvm.vector.reduce.fmax.v{v.type.count}f32", f32, [v], fast=True)

    def rsum_int(self, v: Val) -> Val:
        """Sum the lanes of an int32 vector."""
        return self.call(f"llvm.vector.reduce.add.v{v.type.count}i32", i32, [v])

    def bits(self, word: Val) -> Val:
        """Return the float32 whose bits are the low half of an int64."""
        return self.b.bitcast(self.b.trunc(word, i32), f32)

    # ---- functions ----

    def exp(self, x: Val) -> Val:
        """Emit e^x with an error of about 2 ulp. x is clamped to ±87."""
        b, ty = self.b, x.type
        ints = Vector(i32, ty.count)
        x = self.vmin(self.vmax(x, self.k(ty, -87.0)), self.k(ty, 87.0))
        n = self.each_lane("nearbyint", b.fmul(x, self.k(ty, 1.44269504)))
        r = self.fma(n, self.k(ty, -0.693145752), x)
        r = self.fma(n, self.k(ty, -1.42860677e-6), r)
        p = self.k(ty, 1.0 / 720)
        for term in (1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
            p = self.fma(p, r, self.k(ty, term))
        exponent = b.shl(b.add(b.fptosi(n, ints), self.k(ints, 127)), self.k(ints, 23))
        return b.fmul(p, b.bitcast(exponent, ty))

    def tanh(self, x: Val) -> Val:
        """Emit tanh x as 1 − 2 / (e^2x + 1), absolute error about 1e-7."""
        b, one, two = self.b, self.k(x.type, 1.0), self.k(x.type, 2.0)
        return b.fsub(one, b.fdiv(two, b.fadd(self.exp(b.fmul(x, two)), one)))

    # ---- control ----

    def loop(self, n: Val, carried: Sequence[Val], body: Callable[[Val, list[Val]], Sequence[Val] | None]) -> list[Val]:
        """Emit `for i in range(n): carried = body(i, carried)`. Returns the final carried values."""
        b = self.b
        before = b.block
        head, inside, after = (b.append_basic_block(name) for name in ("head", "inside", "after"))
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(i64)
        i.add_incoming(self.c(0), before)
        values = []
        for v in carried:
            phi = b.phi(v.type)
            phi.add_incoming(v, before)
            values.append(phi)
        b.cbranch(b.icmp_signed("<", i, n), inside, after)
        b.position_at_end(inside)
        new = body(i, list(values)) or ()
        following, end = b.add(i, self.c(1)), b.block
        i.add_incoming(following, end)
        for phi, v in zip(values, new, strict=True):
            phi.add_incoming(v, end)
        b.branch(head)
        b.position_at_end(after)
        return values


def emit(
    arguments: int | tuple[Any, ...], generate: Callable[..., Any], result: Any = types.void
) -> Callable[..., Any]:
    """Make an operation for compiled Python. `generate(emitter, *args)` generates its code.

    `arguments`: their number if all are int64, or numba's types.
    """
    kinds = [types.int64] * arguments if isinstance(arguments, int) else list(arguments)

    def signature() -> tuple[Any, Callable[..., Any]]:
        def codegen(context: Any, builder: Val, _: Any, args: Sequence[Val]) -> Val:
            value = generate(Emitter(builder), *args)
            return context.get_dummy_value() if result == types.void else value

        return result(*kinds), codegen

    def operation(typing_context: Any, *_: Any) -> tuple[Any, Callable[..., Any]]:
        return signature()

    names = ["typing_context", *(f"a{i}" for i in range(len(kinds)))]  # numba inspects the number of parameters
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    operation.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    return cast("Callable[..., Any]", intrinsic(operation))


def each(arguments: int, body: Callable[..., None]) -> Callable[..., Any]:
    """Make an operation f(n, *args) that runs body(g, i, *args) for each of the n vectors of a row."""

    def rows(g: Emitter, n: Val, *args: Val) -> None:
        def one(i: Val, _: list[Val]) -> None:
            body(g, i, *args)

        g.loop(n, (), one)

    return emit(arguments + 1, rows)


def compiled(name: str, function: F, *, inside: bool = False) -> F:
    """Compile a Python function for calls from compiled code. `name` must be unique in the whole program.

    `inside`: inline the function into its callers instead of compiling and optimizing it separately.
    """
    function.__name__ = function.__qualname__ = name
    options: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # never called from Python
    if inside:
        options["inline"] = "always"
    return cast("F", njit(nogil=True, error_model="numpy", **options)(function))


def inline(function: F) -> F:
    """Decorate a module-level function for calls from compiled code. Its name is made of the module's and its own."""
    return compiled(f"{function.__module__}.{function.__name__}".replace(".", "_"), function)


def _template(tid: int, row: Any, context: Any, counter: int) -> int:
    return int(body(tid, row, context, counter))  # type: ignore[name-defined]  # noqa: F821


def kernel(name: str, body: Callable[..., int]) -> Callable[..., int]:
    """Make a kernel that `compiler.compile_kernels` can compile. `body` comes from `compiled`.

    numba identifies a function by file and name, and resolves calls through globals. So each kernel is a copy of
    `_template` with its own name and its own globals. `name` must be unique among all kernels. It must end with the
    name of the instruction set if the code depends on it.
    """
    function = python.FunctionType(_template.__code__, {"body": body, "int": int, "__name__": __name__}, name)
    function.__qualname__, function.__module__ = name, __name__
    return function


def kernels_of(prefix: str, bodies: Mapping[str, Callable[..., int]]) -> dict[str, Callable[[], Callable[..., int]]]:
    """Return makers of kernels by name, from bodies that are the same for every instruction set.

    `prefix`: distinguishes the names of the bodies from those of other modules.
    """

    def maker(name: str, body: Callable[..., int]) -> Callable[[], Callable[..., int]]:
        return lambda: kernel(name, compiled(f"{prefix}_{name}", body))

    return {name: maker(name, body) for name, body in bodies.items()}


# ---- memory, atomics ----


def _add(g: Emitter, address: Val, v: Val) -> Val:
    return g.b.atomic_rmw("add", g.ptr(i64, address), v, "seq_cst")


def _acquire(g: Emitter, address: Val) -> Val:
    return g.b.load_atomic(g.ptr(i64, address), "acquire", 8)


def _peek32(g: Emitter, address: Val) -> Val:
    return g.b.sext(g.ld(i32, address), i64)


def _pause(g: Emitter) -> None:
    if "aarch64" in g.b.module.triple or "arm64" in g.b.module.triple:
        g.call("llvm.aarch64.hint", void, [ir.Constant(i32, 1)])
    else:
        g.call("llvm.x86.sse2.pause", void, [])


atomic_add = emit(2, _add, types.int64)
"""(address of an int64, value) -> its previous value"""
acquire = emit(1, _acquire, types.int64)
"""(address) -> its int64; later loads are not moved before it"""
pause = emit(0, _pause)
"""(): hint to the processor that this is a spin loop"""
peek = emit(1, lambda g, address: g.ld(i64, address), types.int64)
"""(address) -> its int64"""
peek32 = emit(1, _peek32, types.int64)
"""(address) -> its int32"""
poke = emit(2, lambda g, address, v: g.st(v, address))
"""(address, int64): store it"""
poke32 = emit(2, lambda g, address, v: g.st(g.b.trunc(v, i32), address))
"""(address, int64): store its low half"""
clear = each(1, lambda g, i, out: g.put(g.k(f32x16, 0.0), out, i))
"""(vectors, out): write zeros"""
copy = each(2, lambda g, i, x, out: g.put(g.vec(x, i), out, i))
"""(vectors, source, destination): copy a row"""


@inline
def field(address: int, word: int) -> int:
    """Read a word of a table row or of the context."""
    return int(peek(address + 8 * word))
