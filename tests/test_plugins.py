"""Extensions are found by name, and a name from a hostile file finds nothing else."""

from __future__ import annotations

import pytest

from tokenmill import plugins
from tokenmill.errors import Unsupported


def test_a_module_of_the_folder_is_found_by_its_name_and_with_hyphens() -> None:
    assert plugins.find("models", "qwen3").__name__ == "tokenmill.models.qwen3"
    assert "llama" in plugins.names("models")
    assert "base" not in plugins.names("models")


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(Unsupported, match=r"The model type 'gpt99' is not supported. Supported: .*llama.*qwen3"):
        plugins.find("models", "gpt99")


@pytest.mark.parametrize("name", ["", "base", "__init__", "../cli", "os", "qwen3.os", "..cli", "qwen3\n", "_x"])
def test_names_that_name_nothing_of_ours_are_refused(name: str) -> None:
    with pytest.raises(Unsupported):
        plugins.find("models", name)


def test_an_entry_point_of_another_package_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        name = "mine"

        def load(self) -> str:
            return "loaded"

    def entry_points(group: str, name: str = "mine") -> list[Entry]:
        return [Entry()] if (group, name) == ("tokenmill.models", "mine") else []

    monkeypatch.setattr(plugins, "entry_points", entry_points)
    assert plugins.find("models", "mine") == "loaded"
    assert "mine" in plugins.names("models")
