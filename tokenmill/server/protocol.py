"""uvicorn's HTTP protocol with bounds on the size and arrival time of a request, and stricter parsing.

The parser buffers a request line and headers of any length until they are complete, so this counts the bytes that have
arrived. A client that sends a few bytes now and then would hold its connection for ever, so a head has a deadline, and
a body has one that grows with the bytes received. Requests that arrive in one piece cost nothing.
"""

from __future__ import annotations

import asyncio
import re
from asyncio import TimerHandle
from http import HTTPStatus
from typing import Any, Literal

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from tokenmill.server import failures

MAX_HEAD_BYTES = 64 * 1024
"""Limit of request line and headers together."""

HEAD_TIMEOUT_S = 10.0
"""Time from a request's first byte to the end of its headers."""

BODY_TIMEOUT_S = 30.0
"""Time from the end of the headers to the end of a small body."""

MIN_BODY_RATE = 10_000
"""Bytes of a body that extend its deadline by a second."""

DRAIN_TIMEOUT_S = 30.0
"""Time in which a client must read some of an answer that the server has completed."""

IDLE_TIMEOUT_S = 75.0
"""Time in which a new connection must send its first byte."""


ABORT = "tokenmill.abort"
"""Key of a request's scope: the function that drops its connection, with all data that is still to be sent."""

_UPGRADE = b"\r\nupgrade"
_OWS = b" \t"  # RFC 9110, 5.6.3: optional white space
_HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]*")


class _UntilTheEnd(RequestResponseCycle):
    """Answer to HTTP/1.0, which has no chunks: an answer of unknown length ends with the connection."""

    _endless = False

    async def send(self, message: Any) -> None:
        """See ASGI. Sets the body length that uvicorn expects to that of the next message, and one more until the
        end."""
        if message["type"] == "http.response.start":
            self._endless = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
            self.chunked_encoding = False if self._endless else None
        elif self._endless:
            self.expected_content_length = len(message.get("body", b"")) + bool(message.get("more_body"))
        await super().send(message)


class _Refused(Exception):
    """A request whose head must not be served; ends the parser's work on the connection."""


class BoundedProtocol(HttpToolsProtocol):
    """Protocol that answers 400 and closes when a request's head is too long or wrong, 408 when a request arrives too
    slowly.

    White space around header values is removed. Every target is in the form that begins with "/".
    """

    _fault = ""  # reason why the current request's head was refused
    _head_bytes = 0
    _reads_head = True
    _completed = False  # a request ended in this data; bytes behind it are of the next, their number is unknown
    _deadline: TimerHandle | None = None  # of the part that is being read
    _reads: Literal["", "head", "body"] = ""  # the part with the `_deadline`
    _begun = 0.0
    _body_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by asyncio."""
        super().connection_made(transport)
        self._deadline = self.loop.call_later(IDLE_TIMEOUT_S, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        if self._reads_head and _UPGRADE in (head := data[:MAX_HEAD_BYTES].partition(b"\r\n\r\n")[0]).lower():
            data = _without_upgrade(head) + data[len(head) :]
        super().data_received(data)
        if self._completed:
            self._completed, self._head_bytes = False, 0
            self._stop_waiting()
            if not self._reads_head:
                self._wait_for("body", BODY_TIMEOUT_S)
        elif self.transport.is_closing():
            self._stop_waiting()
        elif self._reads_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(400, "The request's headers are too long.")
            elif self._reads != "head":
                self._wait_for("head", HEAD_TIMEOUT_S)
        elif self._reads != "body":
            self._wait_for("body", BODY_TIMEOUT_S)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser, which leaves white space behind a value."""
        super().on_header(name, value.strip(_OWS))

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        if not self.url.startswith(b"/"):
            self.url = _path_of(self.url)
        self._fault = _fault(self.parser.get_http_version(), self.url, self.headers)
        if self._fault:
            raise _Refused
        self._reads_head, self._body_bytes = False, 0
        self.scope[ABORT] = self.transport.abort  # type: ignore[literal-required]
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            self.cycle.__class__ = _UntilTheEnd  # its task has not begun

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self._reads_head = self._completed = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Called when an answer has been handed to the transport, which may still hold most of it."""
        super().on_response_complete()
        left = self.transport.get_write_buffer_size()
        if left:
            self.loop.call_later(DRAIN_TIMEOUT_S, self._check_drained, self.cycle, left)

    def _check_drained(self, cycle: RequestResponseCycle, before: int) -> None:
        """Close the connection of a client that has read nothing of an answer. Later answers of the connection have
        their own check."""
        left = self.transport.get_write_buffer_size()
        if not left or cycle is not self.cycle:
            return
        if left < before:
            self.loop.call_later(DRAIN_TIMEOUT_S, self._check_drained, cycle, left)
        else:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Called where a request cannot be parsed, or was refused for its head; `msg` is the parser's."""
        malformed = "The request is malformed: its first line or one of its headers is not as RFC 9112 has it."
        self._refuse(400, self._fault or malformed)

    def _unsupported_upgrade_warning(self) -> None:
        """Called where the parser stops at an upgrade: the bytes that follow cannot be attributed."""
        self._refuse(400, "Protocol upgrades are not supported.")

    def _wait_for(self, part: Literal["head", "body"], seconds: float) -> None:
        self._stop_waiting()
        self._reads, self._begun = part, self.loop.time()
        self._deadline = self.loop.call_later(seconds, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline, self._reads = None, ""

    def _too_slow(self) -> None:
        if self.flow.read_paused:  # paused by the server, because an earlier request is still being answered
            self._wait_for("body" if self._reads == "body" else "head", BODY_TIMEOUT_S)
            return
        if self._reads == "body":
            allowed = BODY_TIMEOUT_S + self._body_bytes / MIN_BODY_RATE
            left = self._begun + allowed - self.loop.time()
            if left > 0:
                self._deadline = self.loop.call_later(left + 0.1, self._too_slow)
                return
        if not self.transport.is_closing():
            self._refuse(408, f"The request's {self._reads} took too long to arrive.")

    def _may_answer(self) -> bool:
        """Return True if an answer to the request that is being read would come next on the connection."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if self._reads_head:
            return not answering
        return answering and not self.cycle.response_started and not self.pipeline

    def _refuse(self, status: int, message: str) -> None:
        """Answer with an error if no answer has begun, and close."""
        if self._may_answer():
            url = getattr(self, "url", b"")  # unset until a request has begun
            body = failures.body(failures.BodyError(status, message), failures.dialect_of(url.decode("latin-1")))
            self.transport.write(
                b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s"
                % (status, HTTPStatus(status).phrase.encode(), len(body), body)
            )
        self.transport.close()


def _without_upgrade(head: bytes) -> bytes:
    """Return headers without the offer of another protocol, which a server may ignore. Java's client makes it with
    every first request, and the parser would take the body for that protocol."""
    return re.sub(rb"(?i)\r\nupgrade[ \t]*:", b"\r\nx-ignored-upgrade:", head)


def _path_of(target: bytes) -> bytes:
    """Return path and query of a target in absolute form, as proxies send it; "*" as it is; b"" for others."""
    try:
        found = httptools.parse_url(target)
    except httptools.HttpParserInvalidURLError:
        return b""
    if not found.schema:
        return target if target == b"*" else b""
    return (found.path or b"/") + (b"?" + found.query if found.query else b"")


def _fault(version: str, target: bytes, headers: list[tuple[bytes, bytes]]) -> str:
    """Return why a head must not be served (RFC 9112), or "". The parser has refused others."""
    if version not in ("1.1", "1.0"):
        return f"HTTP/{version} is not supported. Use version 1.1 or 1.0."
    if not target:
        return "The request's target must be a path that begins with '/', or a URL with http:// or https://."
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (not hosts and version == "1.1"):
        return f"A request must have one Host header. Given: {len(hosts) or 'none'}."
    if hosts and not _HOST.fullmatch(hosts[0]):
        return "The Host header must be a host name or an address, and may have a port."
    codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
    if codings and version == "1.0":
        return "HTTP/1.0 has no Transfer-Encoding. Send a Content-Length."
    if codings and codings != [b"chunked"]:
        return "The only Transfer-Encoding that is supported is `chunked`."
    return ""
