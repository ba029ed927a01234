"""Errors of the `tokenizers` library: it raises plain Exception, and its panics are no Exception at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenmill.errors import ModelError, StartError
from tokenmill.weights.source import refuse_pointer


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
        raise ModelError(f"{path} cannot be read: {error}. Download the file again.") from None
