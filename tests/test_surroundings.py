"""Variables and folders of containers and batch systems: removed from, or added to, the environment."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tokenmill import surroundings
from tokenmill.surroundings import cache_home, mend, private_folder, usable


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder for temporary files of this test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as a user without an entry in the user database."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(surroundings.pwd, "getpwuid", unknown)


def test_an_ordinary_environment_is_left_as_it_is(temporary: Path) -> None:
    environ = {"HOME": str(temporary), "USER": "me", "WEB_CONCURRENCY": "4", "NUMBA_NUM_THREADS": "2"}
    before = dict(environ)
    assert mend(environ) == []
    assert environ == before


@pytest.mark.parametrize("name", ["WEB_CONCURRENCY", "HF_HUB_ETAG_TIMEOUT", "NUMBA_NUM_THREADS",
                                  "OTEL_EXPORTER_OTLP_TIMEOUT"])  # fmt: skip
@pytest.mark.parametrize("text", ["auto", "0", "-1", "tcp://10.0.0.1:80", "10s"])
def test_what_a_library_could_not_read_is_taken_out_with_a_warning(name: str, text: str, temporary: Path) -> None:
    environ = {"HOME": str(temporary), name: text}
    (warning,) = mend(environ)
    assert warning.startswith(f"`{name}={text}` is ignored")
    assert name not in environ
    quoted = {"HOME": str(temporary), name: '"3"\r'}
    assert mend(quoted) == []
    assert quoted[name] == "3"


def test_what_is_taken_out_would_have_ended_a_library(temporary: Path) -> None:
    environ = {"HOME": str(temporary)} | dict.fromkeys(("HF_HUB_ETAG_TIMEOUT", "WEB_CONCURRENCY"), "auto")
    use = "import huggingface_hub.constants, uvicorn; uvicorn.Config(None)"
    refused = subprocess.run([sys.executable, "-c", use], env=environ, capture_output=True, text=True, check=False)
    assert "ValueError" in refused.stderr
    mend(environ)
    subprocess.run([sys.executable, "-c", use], env=environ, check=True)


def test_a_user_without_home_and_name_gets_both(temporary: Path, nobody: None) -> None:
    environ: dict[str, str] = {}
    (warning,) = mend(environ)
    assert environ == {"HOME": str(temporary / f"cache-tokenmill-{os.getuid()}"), "USER": f"uid{os.getuid()}"}
    assert environ["HOME"] in warning
    assert cache_home(environ) == Path(environ["HOME"]) / ".cache"
    named = {"HOME": str(temporary), "LOGNAME": "me"}
    assert mend(named) == []
    assert "USER" not in named


def test_without_home_the_table_of_users_says_where_it_is() -> None:
    environ: dict[str, str] = {}
    assert mend(environ) == []
    assert cache_home(environ) == Path(surroundings.pwd.getpwuid(os.getuid()).pw_dir) / ".cache"


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that cannot be written to, even by root."""
    folder = tmp_path_factory.mktemp("read-only")
    really = os.access

    def access(path: str | Path, mode: int) -> bool:
        return really(path, mode) and not (mode & os.W_OK and Path(path).is_relative_to(folder))

    monkeypatch.setattr(os, "access", access)
    return folder


def test_a_home_that_cannot_be_written_to_leaves_caches_to_a_private_folder(temporary: Path, read_only: Path) -> None:
    for home in (read_only, read_only / "missing"):
        environ = {"HOME": str(home), "USER": "me"}
        (warning,) = mend(environ)
        assert str(home) in warning
        assert "XDG_CACHE_HOME" in warning
        assert environ["XDG_CACHE_HOME"] == str(private_folder())
        assert cache_home(environ) == cache_home({"HOME": str(home)}) == private_folder()


def test_a_cache_that_can_only_be_read_is_read(temporary: Path, read_only: Path) -> None:
    (read_only / ".cache").mkdir()
    environ = {"HOME": str(read_only), "USER": "me"}
    assert mend(environ) == []
    assert cache_home(environ) == read_only / ".cache"
    assert cache_home({"XDG_CACHE_HOME": str(temporary / "x")}) == temporary / "x"


def test_a_folder_below_a_file_is_not_usable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert not usable(tmp_path / "file" / "below")
    assert usable(tmp_path / "not" / "yet")


def test_a_private_folder_is_the_same_each_time_and_its_owners_alone(temporary: Path) -> None:
    folder = private_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / "kernel").touch()
    assert private_folder() == folder
    folder.chmod(0o777)  # world-writable: its content cannot be trusted
    other = private_folder()
    assert other != folder
    assert other.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("planted", ["link", "file"])
def test_what_another_user_has_put_in_its_place_is_no_private_folder(planted: str, temporary: Path) -> None:
    place = temporary / f"cache-tokenmill-{os.getuid()}"
    (temporary / "theirs").mkdir()
    if planted == "link":
        place.symlink_to(temporary / "theirs")
    else:
        place.touch()
    assert private_folder() not in (place, temporary / "theirs")


def test_a_tmpdir_that_is_not_there_is_named(temporary: Path) -> None:
    environ = {"HOME": str(temporary), "TMPDIR": str(temporary / "missing")}
    (warning,) = mend(environ)
    assert (
        warning
        == f"`TMPDIR={temporary}/missing` is not a folder that can be written to: {temporary} holds temporary files."
    )


def test_without_any_folder_for_temporary_files_shared_memory_is_one(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    monkeypatch.setattr(surroundings, "_MEMORY_FOLDERS", (str(temporary),))
    environ = {"HOME": str(temporary)}
    assert mend(environ) == []
    assert environ["TMPDIR"] == str(temporary)
    monkeypatch.setattr(surroundings, "_MEMORY_FOLDERS", ())
    with pytest.raises(FileNotFoundError):
        mend(environ)


# Limits


def limits(monkeypatch: pytest.MonkeyPatch, **given: int) -> None:
    """Set limits of this process as `resource` returns them; others are unlimited."""
    kinds = {getattr(resource, f"RLIMIT_{name}"): (value, value) for name, value in given.items()}
    none = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(surroundings.resource, "getrlimit", lambda kind: kinds.get(kind, none))


@pytest.mark.parametrize("error, words", [
    (OSError(errno.EMFILE, "Too many open files"), ("the limit is 16.", "`ulimit -n`")),
    (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), ("user's limit is 5.", "`ulimit -u`", "pids")),
    (RuntimeError("can't start new thread"), ("`ulimit -u`", "--cpu-threads", "`ulimit -v` is 4096")),
    (MemoryError(), ("--memory-limit", "`ulimit -v` is 4096")),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), ("--memory-limit", "`ulimit -v`")),
    (ImportError("libx.so: failed to map segment from shared object"), ("--memory-limit", "`ulimit -v`")),
    (OSError("Could not find/load shared object file 'libx.so'"), ("--memory-limit", "`ulimit -v`")),
])  # fmt: skip
def test_an_error_that_is_a_limit_names_the_limit_and_the_cure(
    error: BaseException, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits(monkeypatch, NOFILE=16, NPROC=5, AS=4096 << 10)
    why = surroundings.shortage(error) or ""
    assert all(word in why for word in words), why


@pytest.mark.parametrize("error", [
    ValueError("x"), OSError(errno.ENOENT, "No such file or directory"), ImportError("no module named x"),
    RuntimeError("a thread"), OSError("broken"),
])  # fmt: skip
def test_other_errors_are_no_limit(error: BaseException) -> None:
    assert surroundings.shortage(error) is None


def test_memory_that_is_not_limited_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    limits(monkeypatch)
    assert surroundings.memory_limits() == ""
    limits(monkeypatch, DATA=1 << 20)
    assert surroundings.memory_limits() == " This process's memory is limited (`ulimit -d` is 1024): raise that."


def test_a_soft_limit_of_open_files_is_raised_to_what_is_allowed() -> None:
    code = (
        "import resource; from tokenmill.surroundings import raise_open_files\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (32, 777)); raise_open_files()\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(777, 777)\n"
