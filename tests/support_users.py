"""Another user of this machine, for whom permissions count: root is denied nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

OTHER = 65534


@contextmanager
def another_user() -> Iterator[None]:
    """Be another user than root for a while; skips the test if this process is not root's.

    Nothing may be imported meanwhile: the interpreter's own files may be root's alone.
    """
    if os.geteuid():
        pytest.skip("only root can become another user")
    groups, group = os.getgroups(), os.getegid()
    os.setgroups([])
    os.setegid(OTHER)
    os.seteuid(OTHER)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)
