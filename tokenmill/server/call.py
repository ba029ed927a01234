"""Call: one HTTP request and its answer, between ASGI and a handler.

A handler reads like a list of steps: decode, prepare, submit, answer. It raises errors; `app.py` turns them into
answers.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
from starlette.types import Message, Receive, Scope, Send

from tokenmill import jsontext
from tokenmill.errors import RequestError
from tokenmill.misfit import misfit
from tokenmill.repeated import Repeated, repeated_key
from tokenmill.server import failures
from tokenmill.server.generation import Generation
from tokenmill.server.service import Service
from tokenmill.server.sse import Headers
from tokenmill.text import limits
from tokenmill.text.options import Dialect

T = TypeVar("T")

KEYS = dict[str, msgspec.Raw]
"""The kind of a body of which only the keys are decoded, to choose its kind."""

JSON: tuple[bytes, bytes] = (b"content-type", b"application/json")

_LARGE = 4_000
"""Bytes of a body above which it is decoded in a thread; passing a smaller one on would take longer than decoding
it."""


class ClientGone(Exception):
    """The client closed its connection before the answer was complete."""


class Call:
    """One request. `dialect`: of its errors; `path_rest`: the path behind the route's prefix."""

    def __init__(
        self, service: Service, scope: Scope, receive: Receive, send: Send, dialect: Dialect, path_rest: str
    ) -> None:
        self.arrived = time.monotonic()
        self.service, self.scope, self.dialect, self.path_rest = service, scope, dialect, path_rest
        self._receive, self._send = receive, send
        self._permits = 0
        self._body: bytes | None = None
        self.request_id = ""
        self.route = ""  # the path in the route table
        self.generations: Sequence[Generation] = ()  # submitted sequences, for log and traces
        self.status = 0  # status of the answer; 0: not sent yet
        self.counts_failures = False

    def header(self, name: bytes) -> bytes:
        """Return the value of a request header, or b""."""
        for key, value in self.scope["headers"]:
            if key == name:
                return bytes(value)
        return b""

    async def send(self, message: Message) -> None:
        """Send an ASGI message, and record the status."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)

    @property
    def raw_send(self) -> Send:
        """ASGI's own `send`, for messages that are frequent."""
        return self._send

    async def decode(self, kind: type[T]) -> T:
        """Return the body as a `kind`. Raises BodyError: 415, 413, 408, 400 for invalid JSON, 422 for the wrong shape
        or a key that is given twice."""
        self._check_encoding()
        media_type = self.header(b"content-type").split(b";")[0].strip().lower()
        is_json = media_type == b"application/json" or (
            media_type.startswith(b"application/") and media_type.endswith(b"+json")
        )
        if not is_json:
            raise failures.BodyError(415, "Expected request with `Content-Type: application/json`")
        if self._body is None:
            self._body = await self._read_body()
        body = self._body
        return await self.work(lambda: parse(body, kind))

    def _check_encoding(self) -> None:
        given = [value for key, value in self.scope["headers"] if key == b"content-encoding"]
        names = [name.strip() for value in given for name in value.decode("latin-1").split(",")]
        if any(name.lower() not in ("", "identity") for name in names):
            raise failures.EncodedBody(limits.shown(", ".join(names)))

    async def work(self, step: Callable[[], T]) -> T:
        """Return the result of `step`, which runs in a thread if the body is large, so that other requests go on
        meanwhile.

        `step` must not touch objects of the event loop. A single call into C blocks all threads.
        """
        if len(self._body or b"") <= _LARGE:
            return step()
        return await self.service.in_thread(step)

    async def _read_body(self) -> bytes:
        limit = self.service.options.payload_limit
        length = self.header(b"content-length")
        if length.isdigit() and int(length[:20]) > limit:
            raise self._too_long(limit)
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            parts.append(part)
            size += len(part)
            if size > limit:
                raise self._too_long(limit)
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_long(self, limit: int) -> failures.BodyError:
        return failures.BodyError(413, f"The request body is longer than the limit of {limit} bytes (--payload-limit)")

    def take(self, count: int) -> None:
        """Take permits for `count` sequences, which are given back when the call ends. Raises Overloaded."""
        self.service.permits.take(count)
        self._permits += count

    async def wait(self, done: asyncio.Future[None]) -> bool:
        """Wait for `done`; False if the client left before. The body must have been read."""
        watcher = asyncio.ensure_future(self._disconnected())
        try:
            await asyncio.wait((watcher, done), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watcher.cancel()
        return done.done()

    async def _disconnected(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def answer(self, body: bytes, headers: Headers = [], status: int = 200) -> None:  # noqa: B006 never written
        """Send a whole JSON answer."""
        await self.reply(status, body, [JSON, *headers])

    async def reply(self, status: int, body: bytes, headers: Headers) -> None:
        """Send a whole answer of any type."""
        length = (b"content-length", b"%d" % len(body))
        await self.send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
        await self.send({"type": "http.response.body", "body": body})

    async def fail(self, error: RequestError) -> None:
        """Answer with an error, if no answer has begun."""
        if self.counts_failures:
            self.service.requests.failure(error)
        if not self.status:
            headers = failures.headers(error)
            status = failures.status(error, self.dialect)
            if status in (408, 413):  # because the rest of the body is not read
                headers.append((b"connection", b"close"))
            await self.answer(failures.body(error, self.dialect), headers, status)

    def close(self) -> None:
        """Give back the permits. Idempotent."""
        self.service.permits.release(self._permits)
        self._permits = 0


def parse(body: bytes, kind: type[T]) -> T:
    """Return JSON text as a `kind`. Raises BodyError: 400 for invalid JSON, 422 for the wrong shape or a key given
    twice; the kind `KEYS` is not searched for such keys."""
    collects = gc.isenabled()
    gc.disable()  # new objects are all alive, and a collection would double the time
    try:
        value = msgspec.json.decode(body, type=kind)
        if kind is not KEYS and (repeated := repeated_key(body.decode())) is not None:
            raise _given_twice(repeated)
        return value
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _refusal(body, kind, error) from None
    finally:
        if collects:
            gc.enable()


def _given_twice(repeated: Repeated) -> failures.BodyError:
    place = "".join(f"[{step}]" if isinstance(step, int) else f".{limits.shown(step)}" for step in repeated.steps)
    where = f" - at `${place}`" if place else ""
    message = f"duplicate field `{limits.shown(repeated.key)}`{where}. A key may be given once"
    param = ".".join(map(str, (*repeated.steps, repeated.key)))
    return failures.BodyError(422, f"Failed to deserialize the JSON body into the target type: {message}", param)


def _refusal(body: bytes, kind: Any, error: Exception) -> failures.BodyError:
    """Return the error for a body that msgspec refused, in this server's words."""
    if isinstance(error, msgspec.ValidationError):
        with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            found = misfit(msgspec.json.decode(body, type=msgspec.Raw), kind)
            message = f"Failed to deserialize the JSON body into the target type: {found.sentence('the body')}"
            return failures.BodyError(422, message, found.param)
    why = "it is nested too deeply" if isinstance(error, RecursionError) else jsontext.fault(body)
    return failures.BodyError(400, f"Failed to parse the request body as JSON: {why or 'it cannot be read'}")
