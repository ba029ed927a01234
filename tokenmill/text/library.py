"""Errors of the `tokenizers` library: it raises plain Exception, and its panics are no Exception at all.

What it writes into them changes from version to version; messages of ours do not repeat it, the debug log does.
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
    """True for anything but what ends a process on purpose (KeyboardInterrupt and its like)."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever the library makes of a bad file becomes a ModelError that names it, as does a Git LFS pointer."""
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
    """Tell what a user can do about a file that the library refuses."""
    with contextlib.suppress(OSError):
        if path.suffix == ".json" and (fault := jsontext.fault(path.read_bytes(), sys.maxsize)):
            return f"it is not JSON: {fault}. Download the file again"
    return (
        f"it is none that tokenizers {tokenizers.__version__} takes. Download the file again; if a newer version made "
        "it, upgrade with `pip install --upgrade tokenizers`"
    )
