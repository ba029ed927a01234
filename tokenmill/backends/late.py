"""How a backend with a thread of its own waits, in the middle of a late step, for what the host says of sampling."""

from __future__ import annotations

from concurrent.futures import Future

from tokenmill.backends.base import Masks
from tokenmill.errors import OutOfMemory


class AwaitedMasks:
    """A step's masks: given by one thread, awaited by another. Of a step that is not late there are none."""

    def __init__(self, late: bool) -> None:
        self._future: Future[Masks | None] = Future()
        if not late:
            self._future.set_result(None)

    def give(self, masks: Masks) -> None:
        """They are these. Once."""
        self._future.set_result(masks)

    def give_up(self) -> None:
        """They will never come, unless they have: who waits gets an OutOfMemory."""
        if not self._future.done():
            self._future.set_exception(OutOfMemory("The step before found no memory: this one was given up."))

    def wait(self) -> Masks | None:
        """Blocks until they are known."""
        return self._future.result()
