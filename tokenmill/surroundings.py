"""Handle the process environment: variables set by containers, batch systems and shells, and missing folders.

`stripped` and `is_service_link` interpret values of the environment. `mend` repairs an environment, so that neither a
library nor a missing home folder prevents a start.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import pwd
import re
import resource
import stat
import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path

_QUOTES = ('""', "''", "“”", "‘’")
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://", re.IGNORECASE)
_NUMBERS_OF_LIBRARIES: dict[str, type[int] | type[float]] = {
    "WEB_CONCURRENCY": int,  # uvicorn
    "HF_HUB_DOWNLOAD_TIMEOUT": int,
    "HF_HUB_ETAG_TIMEOUT": int,
    "HF_HUB_LOCAL_DIR_AUTO_SYMLINK_THRESHOLD": int,
    "OTEL_EXPORTER_OTLP_TIMEOUT": float,
    "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": float,
    "NUMBA_NUM_THREADS": int,
}
"""Variables that must be numbers, because libraries raise on import or set-up otherwise."""
_MOST_FILES = 1 << 16
_NOT_MAPPED = ("failed to map segment", "annot allocate memory", "load shared object")  # messages of dynamic loaders
_MEMORY_FOLDERS = ("/dev/shm",)
"""Folders for temporary files if none of the usual ones is writable, as with a read-only container root."""


def stripped(text: str) -> str:
    """Strip white space, line ends and a pair of quotes from a value, because some readers of env files keep them."""
    while True:
        text = text.strip()
        if len(text) < 2 or text[0] + text[-1] not in _QUOTES:
            return text
        text = text[1:-1]


def is_service_link(text: str) -> bool:
    """Return True for values such as `tcp://10.0.0.1:80`, to which Kubernetes and Docker set `<SERVICE>_PORT`."""
    return _SERVICE_LINK.match(text) is not None


def is_port(text: str) -> bool:
    """Return True for a valid port number."""
    return text.isdecimal() and len(text) < 6 and int(text) < 1 << 16


def hostname(given: str, said: bool, warnings: list[str]) -> str:
    """Return the address or host name to listen on. An address may be in brackets, as in a URL.

    `said`: True if given on the command line; False if from HOSTNAME, which containers set to their own name.
    """
    name = given.strip().removeprefix("[").removesuffix("]")
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        pass
    if said and name:
        return "127.0.0.1" if name == "localhost" else name
    if name:
        warnings.append(f"Hostname {name!r} is not an IP address: listening on 0.0.0.0.")
    return "0.0.0.0"


def visible_devices(environ: Mapping[str, str], devices: str = "/dev") -> int | None:
    """Return the number of devices in the first of TGI's variables that lists any; None if none does.

    As in CUDA, an invalid entry ends the list: `-1`, or a batch system's `NoDevFiles`. NVIDIA_VISIBLE_DEVICES may be
    `all`, which means all that a container has.
    """
    for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"):
        count, listed = 0, stripped(environ.get(name, ""))
        if name == "NVIDIA_VISIBLE_DEVICES" and listed.lower() == "all":
            count = len(list(Path(devices).glob("nvidia[0-9]*")))
        for device in listed.split(","):
            if device.strip().lower() in ("", "all", "void", "none", "nodevfiles") or device.strip().startswith("-"):
                break
            count += 1
        if count:
            return count
    return None


def cache_home(environ: Mapping[str, str]) -> Path:
    """Return the folder for caches: XDG_CACHE_HOME, ~/.cache, or a private temporary folder if neither is usable."""
    given = environ.get("XDG_CACHE_HOME") or _home(environ) / ".cache"
    return Path(given) if usable(Path(given)) else private_folder()


def usable(folder: Path) -> bool:
    """Return True if the folder is readable, or does not exist but could be created."""
    if folder.is_dir():
        return os.access(folder, os.R_OK | os.X_OK)
    above = next((parent for parent in folder.absolute().parents if parent.exists()), folder)
    return above.is_dir() and os.access(above, os.W_OK | os.X_OK)


def private_folder() -> Path:
    """Return a private folder of this user in the folder of temporary files, the same on each call if it is safe.

    Its content may be executed (compiled kernels), so a folder that others own or may write to is not used.
    """
    folder = Path(tempfile.gettempdir()) / f"cache-tokenmill-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))
    trusted = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return folder if trusted else Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))


def raise_open_files() -> None:
    """Raise the limit of open files to the hard limit, for this process and its children: each connection is a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def shortage(error: BaseException) -> str | None:
    """Return the remedy if an error means that a system limit is reached (open files, processes, memory); else None."""
    number, text = getattr(error, "errno", None), str(error)
    if number in (errno.EMFILE, errno.ENFILE):
        return (
            f"No more files can be opened: the limit is {_limit(resource.RLIMIT_NOFILE)}. Raise it (`ulimit -n`, "
            "`docker run --ulimit nofile=…`, systemd's LimitNOFILE)."
        )
    if isinstance(error, BlockingIOError) or "can't start new thread" in text:
        return (
            f"No more processes or threads can be started: the user's limit is {_limit(resource.RLIMIT_NPROC)}. Raise "
            "it (`ulimit -u`) or that of the container (`docker run --pids-limit`, pids.max), or lower --cpu-threads "
            f"or --http-workers.{memory_limits()}"
        )
    failed_import = isinstance(error, ImportError | OSError) and any(words in text for words in _NOT_MAPPED)
    if isinstance(error, MemoryError) or number == errno.ENOMEM or failed_import:
        return (
            f"There is not enough memory ({type(error).__name__}: {text or 'nothing is left'}).{memory_limits()} "
            "Lower --memory-limit or --max-total-tokens, which the KV cache follows, or serve a smaller model."
        )
    return None


def _limit(kind: int) -> str:
    soft, _ = resource.getrlimit(kind)
    return "none" if soft == resource.RLIM_INFINITY else str(soft)


def memory_limits() -> str:
    """Return a sentence, after a space, on memory limits of this process below the free memory; "" if none."""
    limits = ((resource.RLIMIT_AS, "v"), (resource.RLIMIT_DATA, "d"))
    given = [f"`ulimit -{letter}` is {int(_limit(kind)) >> 10}" for kind, letter in limits if _limit(kind) != "none"]
    return f" This process's memory is limited ({', '.join(given)}): raise that." if given else ""


def mend(environ: MutableMapping[str, str]) -> list[str]:
    """Remove values that libraries cannot read from `environ`, add missing ones, and return a warning for each change.

    Call it with the process's own environment, before importing libraries. Raises OSError if no folder is writable.
    """
    return [*_drop_unreadable(environ), *_find_temporary(environ), *_find_home(environ)]


def _drop_unreadable(environ: MutableMapping[str, str]) -> list[str]:
    warnings = []
    for name, kind in _NUMBERS_OF_LIBRARIES.items():
        if name not in environ:
            continue
        given, text = environ[name], stripped(environ[name])
        try:
            readable = kind(text) > 0
        except ValueError:
            readable = False
        if readable:
            environ[name] = text
        else:
            del environ[name]
            if given:
                warnings.append(f"`{name}={given}` is ignored: a library reads it, and it is not a number above 0.")
    return warnings


def _find_temporary(environ: MutableMapping[str, str]) -> list[str]:
    given = environ.get("TMPDIR", "")
    try:
        found = tempfile.gettempdir()
    except FileNotFoundError:
        found = next((folder for folder in _MEMORY_FOLDERS if os.access(folder, os.W_OK | os.X_OK)), "")
        if not found:
            raise
        environ["TMPDIR"] = found
    if not given or os.path.realpath(given) == os.path.realpath(found):
        return []
    return [f"`TMPDIR={given}` is not a folder that can be written to: {found} holds temporary files."]


def _find_home(environ: MutableMapping[str, str]) -> list[str]:
    warnings = []
    if not environ.get("HOME") and _entry() is None:
        environ["HOME"] = str(private_folder())
        warnings.append(f"The user {os.getuid()} has no home: {environ['HOME']} is used. Set HOME to a folder to keep.")
    if not environ.get("XDG_CACHE_HOME") and not usable(_home(environ) / ".cache"):
        environ["XDG_CACHE_HOME"] = str(private_folder())
        warnings.append(
            f"{_home(environ)} cannot be written to: {environ['XDG_CACHE_HOME']} holds downloads and compiled kernels. "
            "Set HOME or XDG_CACHE_HOME to a folder to keep."
        )
    if _entry() is None and not any(environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        environ["USER"] = f"uid{os.getuid()}"  # libraries ask for the user's name and fail without one
    return warnings


def _home(environ: Mapping[str, str]) -> Path:
    entry = _entry()
    return Path(environ.get("HOME") or (entry.pw_dir if entry else private_folder()))


def _entry() -> pwd.struct_passwd | None:
    """Return this user's entry of the user database; None if there is none, as for an arbitrary uid in a container."""
    try:
        return pwd.getpwuid(os.getuid())
    except KeyError:
        return None
