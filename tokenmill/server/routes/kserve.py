"""KServe's Open Inference Protocol, version 2: `/v2/…`.

Prompts are inputs of type BYTES, answers are outputs of that type. Every name of a model or version stands for the one
served model. Readiness is that of `/health`.
"""

from __future__ import annotations

import re

import msgspec

from tokenmill.errors import NotReady, ValidationError
from tokenmill.server import failures
from tokenmill.server.call import Call
from tokenmill.server.routes import texts
from tokenmill.server.routes.native import parameters_of
from tokenmill.server.schema.platforms import (
    KserveInput,
    KserveLive,
    KserveOutput,
    KserveRequest,
    KserveResponse,
    KserveServer,
)

_MODEL = re.compile(r"(?P<name>(?:(?!/versions/).)+?)(/versions/(?P<version>[^/]+))?(?P<action>/infer|/ready|)")
_encode = msgspec.json.Encoder().encode


class LengthError(ValidationError):
    """Inputs and outputs do not pair up; TGI has an error type for it."""

    error_type = "length mismatch"


class Utf8Error(ValidationError):
    """An input's bytes are not text; TGI has an error type for it."""

    error_type = "utf8"


async def live(call: Call) -> None:
    """GET /v2/health/live: this process answers."""
    await call.answer(_encode(KserveLive(True)))


async def ready(call: Call) -> None:
    """GET /v2/health/ready: 503 until requests are served."""
    try:
        call.service.check_health()
    except NotReady as error:
        await call.answer(_encode(KserveLive(False)), failures.headers(error), status=503)
        return
    await live(call)


async def server(call: Call) -> None:
    """GET /v2: name and extensions of the server."""
    body = KserveServer("text-generation-inference", call.service.options.version, ["health", "models", "metrics"])
    await call.answer(_encode(body))


async def model(call: Call) -> None:
    """GET /v2/models/{name}[/versions/{version}][/ready]: the model's extensions, or its readiness."""
    found = _MODEL.fullmatch(call.path_rest)
    if found is None or found["action"] == "/infer":
        raise failures.nowhere("GET", call.scope["path"], ["POST"] if found else [])
    if found["action"] == "/ready":
        await ready(call)
    else:
        version = found["version"] or "1"
        await call.answer(_encode(KserveServer(found["name"], version, ["infer", "ready"])))


async def infer(call: Call) -> None:
    """POST /v2/models/{name}[/versions/{version}]/infer: generate for each input."""
    found = _MODEL.fullmatch(call.path_rest)
    if found is None or found["action"] != "/infer":
        raise failures.nowhere("POST", call.scope["path"], ["GET"] if found else [])
    body = await call.decode(KserveRequest)
    if len(body.inputs) != len(body.outputs):
        counts = f"{len(body.inputs)} `inputs` and {len(body.outputs)} `outputs`"
        raise LengthError(f"Inputs and outputs length mismatch. Given: {counts}", "outputs")
    if not body.inputs:
        raise ValidationError("`inputs` cannot be empty", "inputs")
    texts.check_count(call, "inputs", len(body.inputs))
    given = parameters_of(body.parameters)
    prompts = [_text(one, f"inputs[{i}]") for i, one in enumerate(body.inputs)]
    call.take(len(prompts))
    prepared = [await texts.prepare_text(call, prompt, given, "parameters") for prompt in prompts]

    def encode(answers: list[str]) -> bytes:
        outputs = [_output(wanted.name, text) for wanted, text in zip(body.outputs, answers, strict=True)]
        return _encode(KserveResponse(body.id, outputs))

    text_of = [texts.with_prompt(prompt if given.return_full_text else "") for prompt in prompts]
    await texts.answer(call, prepared, sum(map(len, prompts)), texts.Texts(text_of, encode))


def _text(one: KserveInput, where: str) -> str:
    """Return the prompt of an input. Raises Utf8Error, ValidationError."""
    data = one.data
    if len(data) == 1 and isinstance(data[0], str):
        return data[0]
    try:
        return bytes(data).decode()  # type: ignore[arg-type]  # a string among numbers is a TypeError
    except UnicodeDecodeError as error:
        fault = f"byte {error.start} is {data[error.start]}"
        raise Utf8Error(f"`{where}.data` is no UTF-8 text: {fault}, which cannot stand there", where) from None
    except (TypeError, ValueError):
        raise ValidationError(f"`{where}.data` must be bytes, numbers from 0 to 255, or one string", where) from None


def _output(name: str, text: str) -> KserveOutput:
    data = list(text.encode())
    return KserveOutput(name, [1, len(data)], "BYTES", data)
