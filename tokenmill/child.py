"""Entry point of a child process: `python -m tokenmill.child MODULE:FUNCTION READ_FD WRITE_FD`.

The function is called with a `ChildControl`, and the process ends when it returns. A `StartError` is sent to the
supervisor as `Failed`, with its message for the user; any other exception is logged with a traceback. Invariant: a
child does not outlive its supervisor. On Linux the kernel kills it; on other systems its control pipe closes.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
import time

from tokenmill import logs, streams
from tokenmill.errors import NotEnoughMemory, StartError
from tokenmill.parent import die_with_parent, leave_signals_to_parent
from tokenmill.surroundings import memory_limits, shortage
from tokenmill.wire.control import ChildControl, ParentGoneError
from tokenmill.wire.messages import Failed


def main(argv: list[str]) -> int:
    """Run the function named by `argv` and return the exit code: 0, or 1 after `Failed` was sent."""
    target, read_fd, write_fd = argv
    streams.install(lossy=True)
    die_with_parent()
    leave_signals_to_parent()
    try:
        control = ChildControl(int(read_fd), int(write_fd))
    except ParentGoneError:
        return 1
    module_name, _, function = target.partition(":")
    settings = control.configure.settings
    name = f"{module_name.split('.')[-2]} {control.configure.index}"  # "server 0", "runtime 1"
    serves = module_name.startswith("tokenmill.server")  # its log lines have the form of TGI's router
    logs.set_up(
        settings.get("log_level", "info"), json=bool(settings.get("json_output")), flat=serves,
        process="" if serves and settings.get("http_workers", 1) == 1 else name, colors=settings.get("log_colorize"),
    )  # fmt: skip
    try:
        getattr(importlib.import_module(module_name), function)(control)
    except ParentGoneError:
        return 1
    except StartError as error:
        short = isinstance(error, NotEnoughMemory) or os.strerror(errno.ENOMEM) in str(error)
        message = f"{error}{memory_limits() if short else ''}"
        control.send(Failed(error.variant, message, fatal=True, at=time.monotonic()))
        return 1
    except Exception as error:
        if why := shortage(error):
            control.send(Failed(NotEnoughMemory.variant, f"{name}: {why}", fatal=True, at=time.monotonic()))
            return 1
        logging.getLogger(__name__).exception("%s ends after an error that nobody expected", name)
        control.send(Failed("ShardFailed", f"{type(error).__name__}: {error}", fatal=False, at=time.monotonic()))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
