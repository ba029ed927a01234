"""Errors of the `tokenizers` library, which raises plain Exception, and whose panics are not even an Exception.

Their texts change from version to version, so messages to users do not repeat them; the debug log does.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tokenizers

from tokenmill import jsontext
from tokenmill.errors import ModelError, StartError
from tokenmill.weights.source import refuse_pointer

_log = logging.getLogger(__name__)


def is_library_error(error: BaseException) -> bool:
    """Return True for anything but errors that end a process on purpose, such as KeyboardInterrupt."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn any error of the library into a ModelError that names the file, also for a Git LFS pointer."""
    refuse_pointer(path)
    try:
        yield
    except StartError:
        raise
    except BaseException as error:
        if not is_library_error(error):
            raise
        _log.debug("%s: the library tokenizers refuses it", path, exc_info=error)
        raise ModelError(f"{path} cannot be read: {_why(path)}.") from None


def _why(path: Path) -> str:
    """Return the remedy for a file that the library refuses."""
    with contextlib.suppress(OSError):
        if path.suffix == ".json" and (fault := jsontext.fault(path.read_bytes(), sys.maxsize)):
            return f"it is not JSON: {fault}. Download the file again"
    return (
        f"it is none that tokenizers {tokenizers.__version__} takes. Download the file again; if a newer version made "
        "it, upgrade with `pip install --upgrade tokenizers`"
    )
