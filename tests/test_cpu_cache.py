"""Which sources a compiled kernel depends on: an edit recompiles what it can change, and nothing else."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("numba")

from tokenmill.backends.cpu import cache, isa
from tokenmill.backends.cpu.attention_tiles import Heads
from tokenmill.backends.cpu.compiler import MODULES, makers

BACKENDS = Path(cache.__file__).parents[1]
EMITTERS = (*MODULES, "attention")


@pytest.fixture(autouse=True)
def keys_are_made_anew() -> Iterator[None]:
    cache.source_key.cache_clear()
    yield
    cache.source_key.cache_clear()


@pytest.mark.parametrize("isa_name", [i.name for i in isa.available()])
def test_each_kernel_is_keyed_by_the_module_that_emits_it(isa_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in MODULES:
        monkeypatch.setattr("tokenmill.backends.cpu.compiler.MODULES", (module,))
        names = list(makers(isa.detect(isa_name)))
        assert names
        assert {cache.emitter(name) for name in names} == {module}
    assert {cache.emitter(name) for name in Heads("int8", 64, 3).kernels} == {"attention"}


@pytest.mark.parametrize("module", EMITTERS)
def test_the_sources_of_a_kernel_are_all_that_its_module_imports(module: str) -> None:
    sources = cache.sources(module)
    for name in sources:
        tree = ast.parse((BACKENDS / f"{name.replace('.', '/')}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tokenmill.backends"):
                package = (node.module or "").removeprefix("tokenmill.backends").lstrip(".")
                names = {package, *(f"{package}.{alias.name}".lstrip(".") for alias in node.names)}
                modules = {name for name in names if (BACKENDS / f"{name.replace('.', '/')}.py").is_file()}
                assert modules <= set(sources)


def test_an_edit_changes_the_keys_of_the_kernels_that_it_reaches_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {module: cache.source_key(module) for module in EMITTERS}
    original = cache._source
    monkeypatch.setattr(cache, "_source", lambda name: original(name) + "# edited" * (name == "cpu.tiles"))
    cache.source_key.cache_clear()
    assert {module for module in EMITTERS if cache.source_key(module) != before[module]} == {"products", "experts"}
    monkeypatch.setattr(cache, "_source", lambda name: original(name) + "# edited" * (name == "cpu.rows"))
    cache.source_key.cache_clear()
    assert {module for module in EMITTERS if cache.source_key(module) != before[module]} == {
        "products", "experts", "rows", "recurrence", "special_rows", "ordered_rows", "attention",
        "collective_rows",
    }  # fmt: skip
