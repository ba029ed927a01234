"""uvicorn's HTTP protocol with a bound on what comes before a body.

The parser keeps a request line and headers until they are complete, however long they are; so this counts what has
arrived while they are not.
"""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
"""Request line and headers together."""


class BoundedProtocol(HttpToolsProtocol):
    """Answers 400 and closes when a request's head is longer than `MAX_HEAD_BYTES`."""

    _head_bytes = 0
    _reads_head = True
    _completed = False  # a request ended in the data at hand: what of it belongs to the next one is not known

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        super().data_received(data)
        if self._completed:
            self._completed, self._head_bytes = False, 0
        elif self._reads_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("The request's headers are too long.")

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self._reads_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self._reads_head = self._completed = True
        super().on_message_complete()
