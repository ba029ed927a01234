"""Errors as HTTP answers: the only place where a kind of error gets its status and its body.

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
    """The body cannot be read: its form, not its values. `status` is TGI's; OpenAI routes answer 422 as 400."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.status = status


class EncodedBody(BodyError):
    """The body is compressed, which is not undone here: it could be a thousand times as long as it says."""

    def __init__(self, encoding: str) -> None:
        super().__init__(
            415, f"The Content-Encoding {encoding!r} is not supported. Send the body as it is, without Content-Encoding"
        )


class Unauthorized(errors.RequestError):
    """The API key is missing or wrong."""

    error_type = "authentication"


class NotFound(errors.RequestError):
    """Nothing of that name is served here."""

    error_type = "not_found"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownPath(errors.RequestError):
    """Nothing is at that path."""

    error_type = "not_found"


class WrongMethod(errors.RequestError):
    """The path is known, for the methods `allowed`."""

    error_type = "method_not_allowed"

    def __init__(self, message: str, allowed: str) -> None:
        super().__init__(message)
        self.allowed = allowed


# kind: (status of native routes, status of OpenAI routes, OpenAI's type); the most special kind first
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
    """The dialect in which a path answers that no route is at."""
    return "openai" if path == "/v1" or path.startswith("/v1/") else "native"


def nowhere(method: str, path: str, allowed: Iterable[str]) -> errors.RequestError:
    """The error for a request to which no route leads, while those with the methods `allowed` lead somewhere."""
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
    """The HTTP status that says what kind of error this is."""
    if isinstance(error, BodyError):
        return 400 if dialect == "openai" and error.status == 422 else error.status
    native_status, openai_status, _ = _kind(error)
    return native_status if dialect == "native" else openai_status


def text(error: errors.RequestError, dialect: Dialect) -> str:
    """The message as a client reads it: native ones say what kind they are of, in TGI's words."""
    message = str(error)
    if dialect == "openai" or isinstance(error, BodyError):
        return message
    return _PREFIXES.get(error.error_type, "") + message


def body(error: errors.RequestError, dialect: Dialect) -> bytes:
    """The JSON object of an error, the same in a plain answer and in a stream's event."""
    message = text(error, dialect)
    if dialect == "native":
        return msgspec.json.encode(native.ErrorResponse(message, error.error_type))
    code = next((code for kind, code in _CODES if isinstance(error, kind)), None)
    details = openai.ErrorDetails(message, _kind(error)[2], getattr(error, "param", None), code)
    return msgspec.json.encode(openai.ErrorResponse(details, error.error_type))


def headers(error: errors.RequestError) -> list[tuple[bytes, bytes]]:
    """Headers that go with an error: when to come back, how to authenticate, what is allowed instead."""
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
    """The `err` label of `tgi_request_failure`, or None for what TGI does not count."""
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
