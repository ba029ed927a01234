"""Ranks compare what they run before they load anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tokenmill.config import Settings
from tokenmill.parallel.agreement import RanksDiffer, agree
from tokenmill.parallel.group import Group, RanksMissing
from tokenmill.runtime.identity import digest_of, facts_of
from tokenmill.weights.source import ModelSource


def together(run_dir: Path, facts: list[dict[str, str]]) -> list[str]:
    """Return the error of each rank, "" for none."""

    def rank(number: int) -> str:
        group = Group.connect(number, len(facts), str(run_dir / "group.sock"), 5.0)
        try:
            agree(group, facts[number])
            return ""
        except RanksDiffer as error:
            return str(error)
        finally:
            group.close()

    with ThreadPoolExecutor(len(facts)) as pool:
        return list(pool.map(rank, range(len(facts))))


def test_ranks_that_run_the_same_agree(run_dir: Path) -> None:
    assert together(run_dir, [{"tokenmill": "1"}] * 3) == ["", "", ""]
    agree(Group(), {"tokenmill": "1"})


def test_every_rank_names_the_first_that_differs_and_in_what(run_dir: Path) -> None:
    found = together(run_dir, [{"tokenmill": "1.2", "--dtype": ""}, {"tokenmill": "1.2", "--dtype": ""},
                               {"tokenmill": "1.3", "--dtype": "", "new": "x"}])  # fmt: skip
    assert len(set(found)) == 1
    assert found[0].startswith("Rank 2 differs from rank 0: tokenmill is 1.3 there and 1.2 on rank 0; new is x there "
                               "and not known on rank 0. Start every rank with the same version")  # fmt: skip


def test_a_rank_that_does_not_join_is_named_with_the_limit(run_dir: Path) -> None:
    with pytest.raises(RanksMissing, match=r"Ranks 1, 2 did not join the engine within 0\.05 s\. .*--rank-timeout"):
        Group.connect(0, 3, str(run_dir / "group.sock"), 0.05)
    with pytest.raises(RanksMissing, match=r"Rank 0 did not join"):
        Group.connect(1, 2, str(run_dir / "nobody.sock"), 0.05)


def test_the_facts_follow_version_model_and_options(tmp_path: Path) -> None:
    def facts(**options: object) -> dict[str, str]:
        source = ModelSource("m", str(tmp_path), "safetensors")
        return facts_of(Settings(**options), source)  # type: ignore[arg-type]

    (tmp_path / "config.json").write_text(json.dumps({"a": 1}))
    (tmp_path / "model.safetensors").write_bytes(b"12")
    first = facts()
    changes: list[Callable[[], object]] = [
        lambda: (tmp_path / "config.json").write_text("{}"),
        lambda: (tmp_path / "model.safetensors").write_bytes(b"123"),
    ]
    for change in changes:
        before = facts()
        change()
        assert facts()["the model's digest"] != before["the model's digest"]
    assert facts(port=9, api_key="secret") == facts()
    assert facts(dtype="float16")["--dtype"] != first["--dtype"]
    assert "secret" not in str(facts(api_key="secret"))
    assert digest_of(tmp_path / "missing") == digest_of(tmp_path / "gone")
