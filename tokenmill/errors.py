"""Errors that are reported to users, in one tree.

TokenmillError
├── StartError                 the server or a command cannot start; exit code 1, "Error: <variant>: <message>"
│   ├── ArgumentError          an option's value is wrong, or two options contradict each other
│   │   └── UsageError         an environment variable cannot be read as its option; exit code 2
│   ├── DownloadError          weights could not be fetched
│   ├── ModelError             weights, tokenizer or config.json are missing, unreadable or do not fit each other
│   │   └── MissingFiles       some of a model's files are not there
│   ├── Unsupported            unknown name of a model type, a quantization or an operation
│   ├── MissingPackage         a requested feature needs a package that is not installed
│   ├── NotEnoughMemory        the model or its cache does not fit
│   ├── NotEnoughDevices       there are fewer devices than ranks
│   └── AddressInUse           the port is taken
├── OutOfMemory                a step ran out of device memory; the engine retries with a smaller one
└── RequestError               one request cannot be served; others are not affected
    ├── ValidationError        the request is wrong
    │   ├── ContextLengthError prompt and requested tokens exceed the context
    │   ├── GrammarError       a schema, regex or grammar is wrong, too large, or cannot be served exactly
    │   ├── TemplateError      the chat template cannot render the messages
    │   └── ToolError          the requested tools do not exist or contradict each other
    ├── Overloaded             refused because of the limit of requests; states when to retry
    ├── GenerationError        the engine failed during generation
    │   └── BatchError         it failed for some of several prompts; holds the answers to the others
    ├── IncompleteError        the stream ended without a finish reason
    └── NotReady               starting, draining or unhealthy

`error_type` is TGI's name of the kind of error, which clients of TGI read. HTTP statuses are defined in `server/` only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class TokenmillError(Exception):
    """Base of all failures that are explained to the user, without a traceback."""

    error_type = "generation"


class StartError(TokenmillError):
    """A command cannot start. The message names the cause, the given value, the allowed values and the remedy."""

    variant = "StartError"
    exit_code = 1


class ArgumentError(StartError):
    """An option's value is not allowed, or contradicts another's."""

    variant = "ArgumentValidation"


class UsageError(ArgumentError):
    """An environment variable cannot be parsed as its option. On a command line, this is a usage error."""

    exit_code = 2


class DownloadError(StartError):
    """Weights could not be downloaded: no network, no such model, no access to it, or a wrong checksum."""

    variant = "DownloadError"


class ModelError(StartError):
    """A model folder or file is missing, unreadable, or inconsistent with its header."""

    variant = "ShardCannotStart"


class MissingFiles(ModelError):
    """Files of a model are missing.

    `missing`: their names, or a description of their content.
    """

    def __init__(self, message: str, missing: Iterable[str]) -> None:
        super().__init__(message)
        self.missing = tuple(missing)


class Unsupported(StartError):
    """The name of a model type, a quantization or another choice is unknown.

    `kind`: what the name stands for, in the user's words ("model", "quantization"). `known`: the allowed names.
    """

    variant = "ShardCannotStart"

    def __init__(self, kind: str, name: str, known: Iterable[str] = (), cure: str = "") -> None:
        self.kind, self.name, self.known = kind, name, sorted(known)
        allowed = f" Supported: {', '.join(self.known)}." if self.known else ""
        super().__init__(f"The {kind} {name!r} is not supported.{allowed}{' ' + cure if cure else ''}")


class MissingPackage(StartError):
    """A feature needs a package that the base installation does not include."""

    variant = "ShardCannotStart"


class NotEnoughMemory(StartError):
    """The model, or one request of the maximum length, does not fit. The message has both numbers."""

    variant = "ShardCannotStart"


class NotEnoughDevices(StartError):
    """There are fewer devices than ranks. The message has both numbers."""

    variant = "NotEnoughCUDADevices"  # TGI's name


class AddressInUse(StartError):
    """Another process listens on the port."""

    variant = "WebserverCannotStart"


class WrongSecret(StartError):
    """The other end of a connection between machines does not hold this cluster's secret."""

    variant = "ClusterSecret"


class OutOfMemory(TokenmillError):
    """A step ran out of device memory. The step has no effect, and the device remains usable."""


class RequestError(TokenmillError):
    """One request fails. Other requests are not affected."""


class ValidationError(RequestError):
    """The request is invalid. `param`: name of the field, in the API that was called."""

    error_type = "validation"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(ValidationError):
    """The prompt, or prompt and requested tokens together, exceed the context. The message has both numbers."""


class GrammarError(ValidationError):
    """A schema, regex or grammar is malformed, too costly, or cannot be enforced exactly.

    The message names the refused part and, in a JSON schema, the path to it (`#/properties/name`).
    """


class TemplateError(ValidationError):
    """The chat template failed, is missing, or took too long."""

    error_type = "template_error"


class ToolError(ValidationError):
    """The tools or the tool choice of a request are invalid."""

    error_type = "tool_error"


class Overloaded(RequestError):
    """The limit of concurrent requests is reached. `retry_after_s`: time to wait, whole seconds, at least 1."""

    error_type = "overloaded"

    def __init__(self, message: str = "Model is overloaded", retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class GenerationError(RequestError):
    """The engine failed on this request, or ended while it ran."""

    error_type = "generation"


class BatchError(GenerationError):
    """`tokenmill.LLM` failed for some of several prompts.

    `completions`: one per prompt, None where it failed. `errors`: the causes, by the prompt's index.
    """

    def __init__(self, completions: Sequence[Any], errors: Mapping[int, GenerationError]) -> None:
        self.completions, self.errors = list(completions), dict(errors)
        place, first = next(iter(self.errors.items()))
        failed = f"{len(errors)} of {len(completions)} prompts failed, the first at [{place}]: {first}"
        super().__init__(f"{failed}. The others' answers are in `completions`.")


class IncompleteError(RequestError):
    """The stream of tokens ended without a finish reason."""

    error_type = "incomplete_generation"


class NotReady(RequestError):
    """The server is starting, draining or unhealthy. `phase`: which of them, in words."""

    error_type = "healthcheck"

    def __init__(self, phase: str = "unhealthy", retry_after_s: int = 1) -> None:
        super().__init__(phase)
        self.phase, self.retry_after_s = phase, retry_after_s
