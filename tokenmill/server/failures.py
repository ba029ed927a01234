"""Errors as HTTP answers: the only place where a kind of error gets its status and its body.

Two dialects: "native" is TGI's (`{"error", "error_type"}`), "openai" is OpenAI's nested object with TGI's type beside.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from tokenmill import errors
from tokenmill.server.schema import native, openai

Dialect = Literal["native", "openai"]


class BodyError(errors.ValidationError):
    """The body cannot be read: its form, not its values. `status` is TGI's; OpenAI routes answer 422 as 400."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.status = status


class Unauthorized(errors.RequestError):
    """The API key is missing or wrong."""

    error_type = "authentication"


class NotFound(errors.RequestError):
    """Nothing of that name is served here."""

    error_type = "not_found"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


# kind: (status of native routes, status of OpenAI routes, OpenAI's type); the most special kind first
_KINDS: tuple[tuple[type[errors.RequestError], int, int, str], ...] = (
    (Unauthorized, 401, 401, "authentication_error"),
    (NotFound, 404, 404, "invalid_request_error"),
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
    code = "context_length_exceeded" if isinstance(error, errors.ContextLengthError) else None
    if isinstance(error, Unauthorized):
        code = "invalid_api_key"
    elif isinstance(error, NotFound):
        code = "model_not_found"
    details = openai.ErrorDetails(message, _kind(error)[2], getattr(error, "param", None), code)
    return msgspec.json.encode(openai.ErrorResponse(details, error.error_type))


def headers(error: errors.RequestError) -> list[tuple[bytes, bytes]]:
    """Headers that go with an error: when to come back, how to authenticate."""
    if isinstance(error, errors.Overloaded | errors.NotReady):
        return [(b"retry-after", b"%d" % error.retry_after_s)]
    if isinstance(error, Unauthorized):
        return [(b"www-authenticate", b"Bearer")]
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
