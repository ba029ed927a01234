"""Swagger UI, which shows the OpenAPI document: served from files of this package, nothing is loaded from elsewhere."""

from __future__ import annotations

from importlib.resources import files

from tokenmill.server.call import Call

_TYPES = {
    "index.html": b"text/html; charset=utf-8",
    "start.js": b"text/javascript; charset=utf-8",
    "swagger-ui-bundle.js": b"text/javascript; charset=utf-8",
    "swagger-ui.css": b"text/css; charset=utf-8",
    "favicon-32x32.png": b"image/png",
    "LICENSE": b"text/plain; charset=utf-8",
    "NOTICE": b"text/plain; charset=utf-8",
}
"""The files that are served; any other path is 404."""

_POLICY = b"default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"


async def to_docs(call: Call) -> None:
    """GET /docs: the page is in the folder of that name."""
    await call.reply(303, b"", [(b"location", b"/docs/")])


async def docs(call: Call) -> None:
    """GET /docs/ and the files below it."""
    name = call.path_rest or "index.html"
    media_type = _TYPES.get(name)
    if media_type is None:
        await call.reply(404, b"", [])
        return
    content = files("tokenmill.server").joinpath("ui", name).read_bytes()
    headers = [
        (b"content-type", media_type),
        (b"cache-control", b"no-cache" if name == "index.html" else b"max-age=86400"),
        (b"content-security-policy", _POLICY),
        (b"x-content-type-options", b"nosniff"),
    ]
    await call.reply(200, content, headers)
