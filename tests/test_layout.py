"""House rules that are checked automatically: imports, lengths, no hidden state, no pickle, light processes."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "tokenmill").rglob("*.py"))
HOT = ("engine/scheduler.py", "engine/engine.py", "runtime/executor.py")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def tree(path: Path) -> ast.Module:
    """Parse a file, once for all tests."""
    return ast.parse(path.read_text())


@functools.cache
def all_nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(tree(path)))


def nodes(kind: type[ast.AST] | tuple[type[ast.AST], ...]) -> Iterator[tuple[str, ast.AST]]:
    for path in FILES:
        for node in all_nodes(path):
            if isinstance(node, kind):
                yield name_of(path), node


def test_a_file_is_one_idea_of_at_most_400_lines() -> None:
    long = {name_of(path): lines for path in FILES if (lines := path.read_text().count("\n")) > 400}
    assert not long


def test_a_function_fits_a_screen() -> None:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    long = [(file, node.name, length) for file, node in nodes(functions)
            if (length := node.end_lineno - node.lineno + 1) > 60]  # type: ignore[attr-defined]  # fmt: skip
    assert not long


def test_no_state_is_hidden_in_modules() -> None:
    assert not [(file, node.lineno) for file, node in nodes(ast.Global)]  # type: ignore[attr-defined]
    mutable = []
    for path in FILES:
        for node in tree(path).body:
            value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            name = getattr(target, "id", "")
            if isinstance(value, ast.Dict | ast.List | ast.Set) and not name.isupper() and name != "__all__":
                mutable.append((name_of(path), name))
    assert not mutable


def test_only_config_reads_the_environment() -> None:
    readers = {
        file for file, node in nodes(ast.Attribute)
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb")
        and isinstance(node.value, ast.Name) and node.value.id == "os"
    }  # fmt: skip
    assert readers <= {"tokenmill/config.py"}


def test_nothing_is_unpickled_or_evaluated() -> None:
    found = []
    for file, node in nodes((ast.Import, ast.ImportFrom, ast.Call)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [(file, name) for name in names if name.split(".")[0] in ("pickle", "dill", "marshal", "shelve")]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("eval", "exec") or (called == "torch.load" and "weights_only=True" not in ast.unparse(node)):
                found.append((file, called))
    assert not found


VENDORS = {"triton", "flashinfer", "cuda", "cupy", "pynvml", "hip", "intel_extension_for_pytorch"}
VENDORS_PARTS = ("torch.cuda.", "torch.xpu.", "torch.backends.cuda", "torch.backends.cudnn")
VENDORS_WORDS = ("libcuda", "nvml", "nccl", "rccl", "nvidia-smi")


def vendors_names(node: ast.AST) -> Iterator[str]:
    """Return names in a node that only one vendor's devices have."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
        yield from (name for name in names if name.split(".")[0] in VENDORS or f"{name}.".startswith(VENDORS_PARTS))
    elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith(VENDORS_PARTS):
        yield ast.unparse(node)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 80:
        yield from (word for word in VENDORS_WORDS if word in node.value)


def test_only_the_cuda_backend_knows_one_makers_devices() -> None:
    """Elsewhere "cuda" is the name of a device, which torch's builds for AMD use as well."""
    everywhere = {"torch.cuda.empty_cache"}  # has no effect without such a device
    found = {
        (file, name)
        for file, node in nodes((ast.Import, ast.ImportFrom, ast.Attribute, ast.Constant))
        for name in vendors_names(node)
        if name not in everywhere and not file.startswith(("tokenmill/backends/cuda/", "tokenmill/parallel/"))
    }
    assert found == {("tokenmill/operate/env.py", "nvidia-smi")}  # a tool that is used if it is installed


def test_shared_files_say_that_features_go_elsewhere() -> None:
    for name in HOT:
        assert "elsewhere" in (ROOT / "tokenmill" / name).read_text()[:400], name


@pytest.mark.parametrize("modules, never", [
    ("tokenmill.cli tokenmill.launcher", "torch numpy starlette uvicorn tokenizers huggingface_hub rich.progress"),
    ("tokenmill.server.worker", "torch transformers"),
    ("tokenmill.engine.engine tokenmill.engine.border", "torch starlette tokenizers"),
    ("tokenmill.runtime.worker", "torch starlette uvicorn"),
])  # fmt: skip
def test_a_process_imports_only_what_it_needs(modules: str, never: str) -> None:
    code = f"import sys, {', '.join(modules.split())}; print(*sorted(set({never.split()!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""


def test_imports_point_downwards() -> None:
    pytest.importorskip("importlinter")
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout


ONE_TYPE = {
    # `a + b` of two values records an operation, whose fields are values
    ("tokenmill.program.value", "tokenmill.program.ops"),
    # `open_checkpoint` makes the kind of checkpoint that the file is
    ("tokenmill.weights.checkpoint", "tokenmill.weights.gguf"),
    ("tokenmill.weights.checkpoint", "tokenmill.weights.adapter"),
    # lowering experts needs the type of the lowering that has them among its kinds
    ("tokenmill.backends.cpu.items", "tokenmill.backends.cpu.lower"),
    # lowering an attention needs the type of sizes that lowering a program has
    ("tokenmill.backends.cuda.attention", "tokenmill.backends.cuda.lower"),
}
"""Imports, inside of a function or for type checking, that lead back: of two files that make one type."""


def imports_of(modules: dict[str, Path]) -> dict[str, set[str]]:
    """Return the project's modules imported by each module: at its top, inside functions and for type checking."""
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        names: set[str] = set()
        for node in all_nodes(path):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import"
                inner = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
                names |= {full if full in modules else str(node.module) for full in inner.values()}
        found[module] = (names & modules.keys()) - {module}
    return found


def circles(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the imports that are left after removing modules without imports, or without importers, repeatedly."""
    left = imports
    while True:
        imported = set().union(*left.values())
        kept = {name: used & left.keys() for name, used in left.items() if used & left.keys() and name in imported}
        if kept == left:
            return left
        left = kept


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports at the top, inside functions and for type checking count."""
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}
    imports = imports_of(modules)
    for importer, imported in ONE_TYPE:
        imports[importer].discard(imported)
    assert not circles(imports)
    assert circles({"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set(), "e": {"a"}}).keys() == {"a", "b", "c"}
