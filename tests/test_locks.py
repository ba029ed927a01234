"""Lock files: every package that make installs has one version, within pyproject.toml's range, on every platform."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHONS = [text.rpartition(" ")[2] for text in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", text)]
PLATFORMS = [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")]
EXTRAS = {"without-torch": ["test"], "torch": ["torch", "test", "dev"]}
UNLOCKED = {"torch", "triton"}
"""Which build of torch a machine gets is decided by scripts/install.sh; triton's version is torch's, or pinned."""


def locked(name: str) -> list[Requirement]:
    lines = (ROOT / "locks" / f"{name}.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def environments() -> Iterator[dict[str, str]]:
    for python in PYTHONS:
        for platform, machine in PLATFORMS:
            system = "Linux" if platform == "linux" else "Darwin"
            yield {
                "python_version": python, "python_full_version": f"{python}.4", "sys_platform": platform,
                "platform_machine": machine, "platform_system": system, "os_name": "posix", "extra": "",
                "platform_python_implementation": "CPython", "implementation_name": "cpython",
            }  # fmt: skip


def wanted(name: str) -> list[Requirement]:
    if name == "clients":
        lines = (ROOT / "tests/clients/requirements.txt").read_text().splitlines()
        return [Requirement(line.partition("#")[0]) for line in lines if line.partition("#")[0].strip()]
    project = PROJECT["project"]
    texts = [*project["dependencies"], *PROJECT["build-system"]["requires"]]
    texts += [text for extra in EXTRAS[name] for text in project["optional-dependencies"][extra]]
    return [found for text in texts if (found := Requirement(text)).name not in UNLOCKED]


@pytest.mark.parametrize("name", ["without-torch", "torch", "clients"])
def test_every_package_has_one_version_within_its_range_for_each_python_and_system(name: str) -> None:
    for environment in environments():
        pins: dict[str, str] = {}
        for pin in locked(name):
            if pin.marker is None or pin.marker.evaluate(environment):
                assert canonicalize_name(pin.name) not in pins, (pin.name, environment)
                (only,) = pin.specifier
                assert only.operator == "=="
                pins[canonicalize_name(pin.name)] = only.version
        for each in wanted(name):
            if each.marker is None or each.marker.evaluate(environment):
                version = pins.get(canonicalize_name(each.name), "0.dev0")
                assert each.specifier.contains(version, prereleases=version == "0.dev0"), (
                    f'{each} is {version} in locks/{name}.txt: run `make lock ARGS="--upgrade-package {each.name}"`'
                )


@pytest.mark.parametrize("name", ["without-torch", "torch", "clients"])
def test_a_lock_names_no_index_and_no_build_of_torch(name: str) -> None:
    text = (ROOT / "locks" / f"{name}.txt").read_text()
    assert "://" not in text
    assert "+" not in text
    assert not {canonicalize_name(pin.name) for pin in locked(name)} & UNLOCKED
    assert "nvidia" not in text


def test_with_and_without_torch_the_rest_has_the_same_versions() -> None:
    assert set(map(str, locked("without-torch"))) <= set(map(str, locked("torch")))
