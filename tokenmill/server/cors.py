"""CORS: the headers that allow pages of other origins to call. Cookies are never asked for, so any header may be
sent."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.types import Scope

from tokenmill.server.sse import Headers

_EXPOSED = (
    b"x-request-id, x-compute-type, x-compute-time, x-compute-characters, x-total-time, x-validation-time, "
    b"x-queue-time, x-inference-time, x-time-per-token, x-prompt-tokens, x-truncated-tokens, x-generated-tokens, "
    b"retry-after"
)
_USUAL = b"authorization, content-type, x-request-id, x-receipt"


class Cors:
    """CORS rules of one server. `origins`: origins that may call; empty: all."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._origins = frozenset(origin.encode("latin-1", "replace") for origin in origins) - {b"*"}
        self._everybody = not origins or "*" in origins

    def headers(self, scope: Scope) -> Headers:
        """Return the CORS headers of the answer to a request."""
        origin = _header(scope, b"origin")
        exposed = (b"access-control-expose-headers", _EXPOSED)
        if self._everybody:
            anyone = (b"access-control-allow-origin", b"*")
            return [anyone, exposed] if origin else [anyone]
        vary = (b"vary", b"origin")
        return [(b"access-control-allow-origin", origin), vary, exposed] if origin in self._origins else [vary]

    def preflight(self, scope: Scope) -> Headers:
        """Return the further headers of the answer to OPTIONS."""
        asked = _header(scope, b"access-control-request-headers")
        plain = asked if 0 < len(asked) <= 2000 and asked.isascii() else _USUAL
        return [(b"access-control-allow-methods", b"GET,POST"), (b"access-control-allow-headers", plain)]


def _header(scope: Scope, name: bytes) -> bytes:
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return b""
