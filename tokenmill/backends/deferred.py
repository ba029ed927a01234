"""Logits masks that a backend's own thread awaits in the middle of a deferred step."""

from __future__ import annotations

from concurrent.futures import Future

from tokenmill.backends.base import Masks
from tokenmill.errors import OutOfMemory


class AwaitedMasks:
    """Masks of one step, set by one thread and awaited by another. A step that is not deferred has none."""

    def __init__(self, deferred: bool) -> None:
        self._future: Future[Masks | None] = Future()
        if not deferred:
            self._future.set_result(None)

    def give(self, masks: Masks) -> None:
        """Set the masks; call once."""
        self._future.set_result(masks)

    def give_up(self) -> None:
        """Fail the wait with OutOfMemory unless the masks were set."""
        if not self._future.done():
            self._future.set_exception(OutOfMemory("The step before found no memory: this one was given up."))

    def wait(self) -> Masks | None:
        """Block until the masks are set and return them; None if the step is not deferred."""
        return self._future.result()
