"""Errors as HTTP answers: status, body and headers of each kind of error.

Two dialects: "native" is TGI's (`{"error", "error_type"}`), "openai" is OpenAI's nested object with TGI's type beside.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from tokenmill import errors
from tokenmill.server.schema import native, openai
from tokenmill.text import limits
from tokenmill.text.options import Dialect


class BodyError(errors.ValidationError):
    """A body that cannot be read: its form is wrong, not its values. `status`: TGI's; OpenAI routes answer 422 as
    400."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.status = status


class EncodedBody(BodyError):
    """A compressed body. It is refused, because it could be a thousand times as long as its Content-Length."""

    def __init__(self, encoding: str) -> None:
        super().__init__(
            415, f"The Content-Encoding {encoding!r} is not supported. Send the body as it is, without Content-Encoding"
        )


class Unauthorized(errors.RequestError):
    """A missing or wrong API key."""

    error_type = "authentication"


class NotFound(errors.RequestError):
    """A model, or another thing that is named, is not served here."""

    error_type = "not_found"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownPath(errors.RequestError):
    """A path that no route has."""

    error_type = "not_found"


class WrongMethod(errors.RequestError):
    """A path that routes have for other methods only: `allowed`."""

    error_type = "method_not_allowed"

    def __init__(self, message: str, allowed: str) -> None:
        super().__init__(message)
        self.allowed = allowed


# kind: (status of native routes, status of OpenAI routes, OpenAI's type); the most specific kind first
_KINDS: tuple[tuple[type[errors.RequestError], int, int, str], ...] = (
    (Unauthorized, 401, 401, "authentication_error"),
    (NotFound, 404, 404, "invalid_request_error"),
    (UnknownPath, 404, 404, "invalid_request_error"),
    (WrongMethod, 405, 405, "invalid_request_error"),
    (errors.ValidationError, 422, 400, "invalid_request_error"),
    (errors.Overloaded, 429, 429, "rate_limit_error"),
    (errors.NotReady, 503, 503, "service_unavailable_error"),
    (errors.IncompleteError, 500, 500, "server_error"),
    (errors.GenerationError, 424, 500, "server_error"),
)

_PREFIXES = {
    "validation": "Input validation error: ",
    "template_error": "Template error: ",
    "tool_error": "Tool error: ",
    "generation": "Request failed during generation: ",
}


# OpenAI's code, by kind
_CODES: tuple[tuple[type[errors.RequestError], str], ...] = (
    (errors.ContextLengthError, "context_length_exceeded"),
    (Unauthorized, "invalid_api_key"),
    (NotFound, "model_not_found"),
    (UnknownPath, "unknown_url"),
    (WrongMethod, "method_not_supported"),
)


def dialect_of(path: str) -> Dialect:
    """Return the dialect of errors for a path that no route has."""
    return "openai" if path == "/v1" or path.startswith("/v1/") else "native"


def nowhere(method: str, path: str, allowed: Iterable[str]) -> errors.RequestError:
    """Return the error for a request that no route matches. `allowed`: methods that the path has routes for."""
    where = limits.shown(path)
    names = ",".join(name for one in allowed for name in ((one, "HEAD") if one == "GET" else (one,)))
    if names:
        return WrongMethod(f"{limits.shown(method)} is not supported at {where}. Allowed: {names}", names)
    return UnknownPath(f"There is nothing at {where}. GET /docs shows all paths")


def _kind(error: errors.RequestError) -> tuple[int, int, str]:
    for kind, native_status, openai_status, name in _KINDS:
        if isinstance(error, kind):
            return native_status, openai_status, name
    return 500, 500, "server_error"


def status(error: errors.RequestError, dialect: Dialect) -> int:
    """Return the HTTP status of an error."""
    if isinstance(error, BodyError):
        return 400 if dialect == "openai" and error.status == 422 else error.status
    native_status, openai_status, _ = _kind(error)
    return native_status if dialect == "native" else openai_status


def text(error: errors.RequestError, dialect: Dialect) -> str:
    """Return the message for a client. Native ones begin with the kind of error, in TGI's words."""
    message = str(error)
    if dialect == "openai" or isinstance(error, BodyError):
        return message
    return _PREFIXES.get(error.error_type, "") + message


def body(error: errors.RequestError, dialect: Dialect) -> bytes:
    """Return the JSON object of an error, the same in a whole answer and in a stream's event."""
    message = text(error, dialect)
    if dialect == "native":
        return msgspec.json.encode(native.ErrorResponse(message, error.error_type))
    code = next((code for kind, code in _CODES if isinstance(error, kind)), None)
    details = openai.ErrorDetails(message, _kind(error)[2], getattr(error, "param", None), code)
    return msgspec.json.encode(openai.ErrorResponse(details, error.error_type))


def headers(error: errors.RequestError) -> list[tuple[bytes, bytes]]:
    """Return the headers of an error: when to retry, how to authenticate, what is allowed instead."""
    if isinstance(error, errors.Overloaded | errors.NotReady):
        return [(b"retry-after", b"%d" % error.retry_after_s)]
    if isinstance(error, Unauthorized):
        return [(b"www-authenticate", b"Bearer")]
    if isinstance(error, WrongMethod):
        return [(b"allow", error.allowed.encode())]
    if isinstance(error, EncodedBody):
        return [(b"accept-encoding", b"identity")]
    return []


def failure_label(error: errors.RequestError) -> str | None:
    """Return the `err` label of `tgi_request_failure`, or None for errors that TGI does not count."""
    if isinstance(error, errors.TemplateError):
        return "template"
    if isinstance(error, errors.ToolError | BodyError):
        return None
    for kind, label in (
        (errors.ValidationError, "validation"),
        (errors.Overloaded, "overloaded"),
        (errors.IncompleteError, "incomplete"),
        (errors.GenerationError, "generation"),
    ):
        if isinstance(error, kind):
            return label
    return None
