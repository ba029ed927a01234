"""Generate the pages of docs/reference from the code: `tokenmill schema cli`, `tokenmill schema http-api`.

A test compares them with the files in the folder, so they stay current.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import inf
from typing import Any

from tokenmill import errors, options
from tokenmill.config import WITHOUT_EFFECT, Settings
from tokenmill.server import failures, openapi
from tokenmill.server.metrics import CATALOG, Metric
from tokenmill.server.routes.table import ROUTES
from tokenmill.text import limits

_GROUPS = {
    "model_id": "The model", "sharded": "Devices", "max_concurrent_requests": "Limits", "hostname": "HTTP",
    "json_output": "Running", "device": "Not in TGI",
}  # fmt: skip
"""First option of each group -> the group's title"""

_CLI_HEAD = """\
# Command line

Made from the code by `tokenmill schema cli`.

The command line beats the environment, which beats the default. A boolean is a flag, or takes `true` or `false`
(`1`, `0`, `yes`, `no`, `on`, `off`); a variable takes the word. An empty variable is one that is not set. Lists are
repeated options, or one with commas. An option that does nothing here is named in a warning at the start, one whose
machinery is not there yet is refused with its cure: none is ignored in silence.

White space, line ends and quotes around a variable's value are no part of it. A variable that cannot be read as its
option ends the start with exit code 2, unless it would have no effect, is the address of a service
(`PROMETHEUS_PORT=tcp://10.0.0.1:9090`, as Kubernetes sets them) or is meant for other programs as well
(`OMP_NUM_THREADS`, of whose list `2,1` the first number counts): then a warning names it. `--hostname` takes an address
(`::1` or `[::1]`) or a name; in `HOSTNAME`, which every container has, a name means all addresses. Without a home that
can be written to, downloads and compiled kernels go to a private folder among the temporary files: a warning names it.
"""

_CLI_TAIL = """\
## Signals

After SIGTERM, SIGINT or SIGHUP (unless `nohup` has turned it off) running requests have
`--graceful-termination-timeout` seconds to finish; what has not finished then ends with an error. The port stays open
meanwhile: new requests, on new and on kept connections, get 503 with `Retry-After` and `Connection: close`, `/health`
too; `/metrics` and `/v2/health/live` answer. A second SIGTERM or SIGINT, or SIGQUIT, ends all at once. It does not
matter whether the signal reaches the server's first process only or all of them. However the first process ends, no
other is left.

A server goes on when its output is closed, full, or of a reader that has gone or does not read: lines are lost. What
the output's encoding has not is written as escapes.

## Logs

Lines go to stdout: text, or one JSON object each with `--json-output`. `LOG_LEVEL` is a level (`trace`, `debug`,
`info`, `warn`, `error`, `off`), for this server's own lines, or a list of `target=level`, as
`info,tokenmill.engine=debug`; targets of TGI's own (`text_generation_router=debug`) mean this server.

Each answered prompt is one line, `Success`, of the span `generate` (or `generate_stream`, `compat_generate`,
`completions`, `chat_completions`, …) with the fields `parameters`, `total_time`, `validation_time`, `queue_time`,
`inference_time`, `time_per_token`, `seed` and `request_id`; in JSON they are under `span`. Prompts, answers and keys
are never logged. `Connected` is logged when the server is ready.
"""

_HTTP_HEAD = """\
# HTTP API

Made from the code by `tokenmill schema http-api`. The same as an OpenAPI document: `tokenmill schema`, or
`/api-doc/openapi.json` and `/docs` of a running server.

Bodies are JSON (`application/json`, `application/*+json`). Unknown fields are ignored, null means the default. A
`traceparent` header is the parent of the request's trace. `"receipt": true` in the body, or the header `x-receipt: 1`,
adds a receipt to the answer or the last event of its stream.

Programs between clients and servers may ask for the means to go on with a broken stream at another server of the same
model: with the header `x-tokenmill-token-ids: 1`, each event begins with the ids of its tokens, as `id: 12,345`; with
`x-tokenmill-resume`, base64 of token ids of three bytes each (little-endian), the answer begins with these tokens.
"""

_HEADERS = {
    "x-compute-type": "`COMPUTE_TYPE`, or number and kind of the devices",
    "x-compute-time": "seconds from arrival to the last token",
    "x-compute-characters": "characters of the prompt",
    "x-total-time": "milliseconds from arrival to the last token",
    "x-validation-time": "milliseconds from arrival to the queue",
    "x-queue-time": "milliseconds in the queue",
    "x-inference-time": "milliseconds from leaving the queue to the last token",
    "x-time-per-token": "milliseconds of inference per token",
    "x-prompt-tokens": "tokens of the prompt",
    "x-generated-tokens": "tokens of the answer",
    "x-truncated-tokens": "tokens that `truncate` cut off the prompt, if any",
    "x-accel-buffering": "`no`, of streams: proxies shall not hold them back",
    "x-request-id": "the request's `x-request-id`, up to 128 visible characters of ASCII, or a new one",
    "retry-after": "seconds, of 429 and 503",
}

_LIMITS_HEAD = """\
A value outside is refused, by 422 on TGI's routes and 400 on OpenAI's, with a message that names field and limit.
"""

_ERRORS_HEAD = """\
TGI's routes answer `{"error", "error_type"}`; OpenAI's `{"error": {"message", "type", "param", "code"}, "error_type"}`.
An error after the first event of a stream is an event of that form; what is found before it is a plain answer.
"""

_ERRORS: tuple[tuple[errors.RequestError, str], ...] = (
    (failures.BodyError(400, ""), "the body is not JSON"),
    (failures.BodyError(413, ""), "the body is longer than `--payload-limit`"),
    (failures.BodyError(415, ""), "the body's content type is not JSON, or it has a `content-encoding`"),
    (failures.BodyError(422, ""), "a field of the body is missing or of the wrong type"),
    (errors.ValidationError(""), "a field's value is not allowed; `param` names it"),
    (errors.ContextLengthError(""), "prompt and wanted tokens exceed the context; `code` is `context_length_exceeded`"),
    (errors.TemplateError(""), "the chat template cannot render the messages, is missing, or took too long"),
    (errors.ToolError(""), "tools, or a choice of them, that cannot be followed"),
    (failures.Unauthorized(""), "the API key is missing or wrong; TGI's routes answer without a body"),
    (failures.NotFound(""), "nothing of that name is served, and `--strict-model-name` is on"),
    (failures.UnknownPath(""), "nothing is at that path; TGI's routes answer without a body"),
    (failures.WrongMethod("", ""), "`allow` says which methods are; TGI's routes answer without a body"),
    (errors.Overloaded(), "`--max-concurrent-requests` are running; `retry-after` says when to come back"),
    (errors.GenerationError(""), "the engine gave up on the request, or went away with it"),
    (errors.IncompleteError(""), "the answer ended without its last token"),
    (errors.NotReady(), "starting, restarting or draining; the message says which, `retry-after` when to come back"),
)


def cli(commands: Mapping[str, str]) -> str:
    """Generate docs/reference/cli.md. `commands`: each subcommand -> its line of help."""
    words = [(f"`tokenmill {name}`", text) for name, text in commands.items()]
    parts = [_CLI_HEAD, "## Commands\n", _table(("Command", ""), words)]
    parts.append(_table(("TGI's name", "is"), [
        ("`text-generation-launcher`", "`tokenmill serve`"),
        ("`text-generation-server serve MODEL`", "`tokenmill serve --model-id MODEL`"),
        ("`text-generation-server download-weights`", "`tokenmill download-weights`"),
        ("`text-generation-server quantize`", "`tokenmill quantize`, with the same arguments"),
        ("`text-generation-benchmark`", "the engine's own speed by batch size; `--help` lists its options"),
    ]))  # fmt: skip
    rows: list[tuple[str, ...]] = []
    parts.append("## Options of the server\n")
    for field in options.fields_of(Settings):
        if field.name in _GROUPS:
            parts += _section(rows)
            parts.append(f"### {_GROUPS[field.name]}\n")
            rows = []
        if field.variables or not field.option.env_only:
            rows.append(_option(field))
    parts += _section(rows)
    parts += ["### Variables without effect\n", "They are TGI's; a warning names each that is set.\n"]
    parts.append(_table(("Variable", "Why"), [(f"`{name}`", why) for name, why in WITHOUT_EFFECT.items()]))
    parts += ["## Exit codes\n", _table(("Code", "Meaning"), [
        ("0", "done, or stopped by a signal"), ("1", "an error, explained on stderr as `Error: <kind>: …`"),
        ("2", "wrong usage: an unknown option, a value of the wrong kind"), ("130", "interrupted before serving"),
    ])]  # fmt: skip
    parts.append(_table(("Kind", "Meaning"), sorted(_variants(errors.StartError))))
    return "\n".join([*parts, _CLI_TAIL])


def _section(rows: list[tuple[str, ...]]) -> list[str]:
    return [_table(("Option", "Variable", "Default", "Meaning"), rows)] if rows else []


def _option(field: options.Field) -> tuple[str, ...]:
    option = field.option
    names = [] if option.env_only else [field.flag, *([option.short] if option.short else [])]
    shown = "" if field.default in (None, "", ()) else f"`{_json(field.default)}`"
    notes = [option.help]
    if option.choices and not option.later:
        notes.append(f"One of {_code(option.choices)}.")
    if option.at_least is not None or option.at_most is not None:
        notes.append(_range(option.at_least, option.at_most) + ".")
    if option.later:
        notes.append(f"**Refused:** {option.later}")
    if option.no_effect:
        notes.append(f"**No effect:** {option.no_effect}")
    return _code(names), _code(field.variables), shown, " ".join(notes)


def _range(least: float | None, most: float | None) -> str:
    if least is None:
        return f"At most {most:g}"
    return f"At least {least:g}" if most is None else f"{least:g} to {most:g}"


def _variants(kind: type[errors.StartError]) -> Iterator[tuple[str, str]]:
    for sub in kind.__subclasses__():
        if sub.__module__ == errors.__name__:
            yield f"`{sub.variant}`", (sub.__doc__ or "").partition("\n")[0]
            yield from _variants(sub)


def http_api() -> str:
    """Generate docs/reference/http-api.md."""
    document = openapi.document(ROUTES)
    parts = [_HTTP_HEAD, "## Routes\n", _routes(document), "## Limits\n", _LIMITS_HEAD, _limits()]
    parts += ["## Errors\n", _ERRORS_HEAD, _errors(), "## Headers of answers\n"]
    parts.append(_table(("Header", "Value"), [(f"`{name}`", text) for name, text in _HEADERS.items()]))
    parts += ["## Metrics\n", "`GET /metrics`, in Prometheus' text format, of all HTTP workers together.\n", _metrics()]
    parts.append("## Bodies\n")
    for name, schema in sorted(document["components"]["schemas"].items()):
        parts += _schema(name, schema)
    return "\n".join(parts)


def _routes(document: dict[str, Any]) -> str:
    rows = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            route = f"{method.upper()} {path}"
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            answers = operation.get("responses", {}).get("200", {}).get("content", {})
            kinds = [_type(kind["schema"]) + (", a stream" if "event-stream" in name else "")
                     for name, kind in answers.items() if "schema" in kind]  # fmt: skip
            key = "yes" if operation.get("security") else ""
            summary = str(operation.get("summary", "")).removeprefix(f"{route}: ")
            rows.append((f"`{route}`", key, summary, _type(body) if body else "", "; ".join(kinds)))
    return _table(("Route", "Key", "", "Body", "Answer"), rows)


def _limits() -> str:
    table = (*limits.TABLE, limits.TRUNCATE, limits.BEST_OF, limits.GRAMMAR, *limits.OPENAI_TABLE, limits.LOGPROBS)
    rows = []
    for limit in table:
        if any(other.name == limit.name and other.measure == limit.measure and limit.most == inf != other.most
               for other in table):  # fmt: skip
            continue  # TGI's bound, kept for its message; another limit for the same value is narrower
        openai = limits.OPENAI_NAMES.get(limit.name, limit.name)
        upper = f"`--{limit.most.replace('_', '-')}`" if isinstance(limit.most, str) else _amount(limit.most)
        lower = f"{'more than ' if limit.above else ''}{_amount(limit.least)}"
        if limit.openai_least is not None:
            lower += f" (OpenAI's routes: {_amount(limit.openai_least)})"
        if limit.openai_most is not None:
            upper += f" (OpenAI's routes: {limit.openai_most}, or that if it is more)"
        names = f"`{limit.name}`", f"`{openai}`" if openai != limit.name else ""
        if limit in (*limits.OPENAI_TABLE, limits.LOGPROBS):
            names = "", f"`{openai}`"
        rows.append((*names, lower, upper, limit.unit))
    return _table(("Field", "OpenAI's name", "At least", "At most", "Of"), rows)


def _amount(value: float) -> str:
    return "" if abs(value) == inf else f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _errors() -> str:
    rows = []
    for error, meaning in _ERRORS:
        native, openai = failures.status(error, "native"), failures.status(error, "openai")
        rows.append((f"`{error.error_type}`", str(native), str(openai), meaning))
    return _table(("`error_type`", "TGI's routes", "OpenAI's routes", "Meaning"), rows)


def _metrics() -> str:
    return _table(
        ("Metric", "Type", "Labels", "Meaning"),
        [
            *((f"`{m.name}`", m.kind, _code(name for name, _ in m.labels), _meaning(m)) for m in CATALOG),
            ("`tokenmill_model_info`", "gauge", "", "1; its labels say what is served by what"),
        ],
    )


def _meaning(metric: Metric) -> str:
    if isinstance(metric.buckets, str):
        return f"{metric.help}; a hundred buckets up to `--max-{metric.buckets}-tokens`"
    return metric.help


def _schema(name: str, schema: dict[str, Any]) -> Iterator[str]:
    yield f"### {name}\n"
    yield str(schema.get("description", "")).replace("\n\n", "\n").rstrip() + "\n"
    required = set(schema.get("required", ()))
    rows = []
    for field, kind in schema.get("properties", {}).items():
        default = kind.get("default")
        shown = "required" if field in required else "" if default in (None, [], {}) else f"`{_json(default)}`"
        rows.append((f"`{field}`", _type(kind), shown, str(kind.get("description", ""))))
    if rows:
        yield _table(("Field", "Type", "Default", "Meaning"), rows)


def _json(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type(schema: dict[str, Any]) -> str:
    """Describe the type of a JSON schema in words. An allowed null is not mentioned."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for word in ("anyOf", "oneOf", "allOf"):
        if word in schema:
            kinds = [_type(one) for one in schema[word] if one.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]) if value is not None)
    kind = schema.get("type", "any")
    if isinstance(kind, list):
        return " or ".join(one for one in kind if one != "null")
    if kind == "array":
        return f"list of {_type(schema['items'])}" if schema.get("items") else "list"
    return str(kind)


def _code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)
