"""Relay of HTTP requests to one server: headers and bytes pass unchanged, as they come."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable

import aiohttp
from yarl import URL

from tokenmill.deploy.messages import Ask, Head, Headers, ReplicaLost

_HOP_BY_HOP = frozenset((b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer",
                         b"transfer-encoding", b"upgrade", b"expect"))  # fmt: skip
_NOT_ASKED = _HOP_BY_HOP | {b"content-length"}  # the client of this module sets it by the body
_NOT_ANSWERED = _HOP_BY_HOP | {b"date", b"server"}  # the outermost server sets them
_OWN_OF_AIOHTTP = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
_CONNECT_S = 5.0
_ANSWER_BYTES = 1 << 18  # of a header line at most, and of what is read ahead


def _without(headers: Iterable[tuple[bytes, bytes]], names: frozenset[bytes]) -> Headers:
    return [(name, value) for name, value in headers if name.lower() not in names]


class Relay:
    """Client of the server at `address`, `http://host:port`. For one event loop."""

    def __init__(self, address: str, replica: str) -> None:
        """Make a relay that has no connection yet. `replica`: name in its answers."""
        self._address, self._replica = address, replica
        self._session: aiohttp.ClientSession | None = None
        self._closed = False

    async def send(self, ask: Ask) -> AsyncGenerator[Head | bytes, None]:
        """Send a request and yield its answer. Raises ReplicaLost if the connection breaks. See `Replicas.send`."""
        if self._closed:
            raise ReplicaLost("the replica has ended")
        try:
            async with self._client().request(
                ask.method,
                URL(self._address + ask.target, encoded=True),
                headers=[(n.decode("latin-1"), v.decode("latin-1")) for n, v in _without(ask.headers, _NOT_ASKED)],
                data=ask.body or None,
                allow_redirects=False,
                skip_auto_headers=_OWN_OF_AIOHTTP,
            ) as answer:
                yield Head(self._replica, answer.status, _without(answer.raw_headers, _NOT_ANSWERED))
                async for part in answer.content.iter_any():
                    yield part
        except (aiohttp.ClientError, OSError) as error:
            raise ReplicaLost(f"the connection to the server broke: {error or type(error).__name__}") from None

    async def fetch(self, ask: Ask) -> tuple[Head, bytes]:
        """Send a request and return its whole answer. Raises ReplicaLost."""
        parts = [part async for part in self.send(ask)]
        head, *body = parts
        assert isinstance(head, Head)
        return head, b"".join(part for part in body if isinstance(part, bytes))

    async def close(self) -> None:
        """Close all connections; further requests raise ReplicaLost. Idempotent."""
        self._closed = True
        if self._session is not None:
            await self._session.close()

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
                auto_decompress=False,
                max_line_size=_ANSWER_BYTES,
                max_field_size=_ANSWER_BYTES,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session
