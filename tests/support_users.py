"""Switch to an unprivileged user: permissions are not enforced for root."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

OTHER = 65534


@contextmanager
def another_user() -> Iterator[None]:
    """Run as another user than root until the block ends. Skip the test if this process is not root's.

    Do not import anything in the block: the interpreter's files may be readable by root only.
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
