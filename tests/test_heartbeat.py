"""Notes of a rank, as another process reads them."""

from __future__ import annotations

from pathlib import Path

from tokenmill.heartbeat import Heartbeat, heartbeat_path, stack_path


def test_a_note_is_read_through_another_mapping_and_the_last_one_counts(tmp_path: Path) -> None:
    ours, theirs = Heartbeat(str(tmp_path / "beat")), Heartbeat(str(tmp_path / "beat"))
    ours.note("a long place", 3.0)
    ours.note("short", float("inf"))
    assert theirs.read() == (2, float("inf"), "short")
    again = Heartbeat(str(tmp_path / "beat"))  # of the next generation
    again.note("ü" * 1000, 1.0)
    assert theirs.read().notes == 3
    assert theirs.read().place.startswith("ü" * 200)
    assert (tmp_path / "beat").stat().st_mode & 0o777 == 0o600


def test_each_rank_of_each_engine_has_its_own_files() -> None:
    paths = {of("/run", engine, rank) for of in (heartbeat_path, stack_path) for engine in (1, 11) for rank in (1, 11)}
    assert len(paths) == 8
