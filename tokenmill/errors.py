"""Every error that a user can meet, in one tree.

TokenmillError
├── StartError                 the server or a command cannot start; exit code 1, "Error: <variant>: <message>"
│   ├── ArgumentError          an option's value is wrong, or two options contradict each other
│   │   └── UsageError         an environment variable cannot be read as its option; exit code 2
│   ├── DownloadError          weights could not be fetched
│   ├── ModelError             weights, tokenizer or config.json are missing, unreadable or do not fit each other
│   │   └── MissingFiles       some of a model's files are not there
│   ├── Unsupported            nothing of that name exists: a model type, a quantization, an operation
│   ├── MissingPackage         what was asked for needs a package that is not installed
│   ├── NotEnoughMemory        the model or its cache does not fit
│   └── AddressInUse           the port is taken
├── OutOfMemory                a step found no memory on the device; the engine tries again with less
└── RequestError               one request cannot be served; the others go on
    ├── ValidationError        the request is wrong
    │   ├── ContextLengthError prompt and wanted tokens exceed the context
    │   ├── GrammarError       a schema, regex or grammar is wrong, too large, or cannot be served exactly
    │   ├── TemplateError      the chat template cannot render the messages
    │   └── ToolError          the tools asked for do not exist or contradict each other
    ├── Overloaded             refused at once; says when to come back
    ├── GenerationError        the engine failed in the middle
    │   └── BatchError         it did with some of several prompts; has the answers to the others
    ├── IncompleteError        the stream ended without a last token
    └── NotReady               starting, draining or unhealthy

`error_type` is TGI's name of the kind, which its clients look at. Which HTTP status a kind has is decided in
`server/` alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class TokenmillError(Exception):
    """Any failure that is explained to a user instead of being traced."""

    error_type = "generation"


class StartError(TokenmillError):
    """A command cannot do its work. The message names the cause, what was given, what is allowed and the cure."""

    variant = "StartError"
    exit_code = 1


class ArgumentError(StartError):
    """An option's value is not allowed, or contradicts another's."""

    variant = "ArgumentValidation"


class UsageError(ArgumentError):
    """An option's text is not of its kind: what a command line is refused for, in an environment variable."""

    exit_code = 2


class DownloadError(StartError):
    """Weights could not be fetched: no network, no such model, no right to it, a checksum that differs."""

    variant = "DownloadError"


class ModelError(StartError):
    """A model folder or file is missing, unreadable, or not what its header says."""

    variant = "ShardCannotStart"


class MissingFiles(ModelError):
    """Files of a model are not where they should be.

    `missing`: their names, or what they would hold.
    """

    def __init__(self, message: str, missing: Iterable[str]) -> None:
        super().__init__(message)
        self.missing = tuple(missing)


class Unsupported(StartError):
    """Nothing of this kind has this name.

    `kind` as a user would say it ("model", "quantization"), `known` the names that would have been found.
    """

    variant = "ShardCannotStart"

    def __init__(self, kind: str, name: str, known: Iterable[str] = (), cure: str = "") -> None:
        self.kind, self.name, self.known = kind, name, sorted(known)
        allowed = f" Supported: {', '.join(self.known)}." if self.known else ""
        super().__init__(f"The {kind} {name!r} is not supported.{allowed}{' ' + cure if cure else ''}")


class MissingPackage(StartError):
    """Something needs a package that the base installation leaves out."""

    variant = "ShardCannotStart"


class NotEnoughMemory(StartError):
    """The model, or one request of the wanted length, does not fit; both numbers are in the message."""

    variant = "ShardCannotStart"


class AddressInUse(StartError):
    """Another process listens on the port."""

    variant = "WebserverCannotStart"


class OutOfMemory(TokenmillError):
    """A step found no memory on the device. Nothing of it counts, and the device is as usable as before."""


class RequestError(TokenmillError):
    """One request fails; nobody else notices."""


class ValidationError(RequestError):
    """The request breaks a rule. `param` names the field, in the words of the API that was called."""

    error_type = "validation"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(ValidationError):
    """The prompt, or prompt and wanted tokens together, exceed the context; both numbers are in the message."""


class GrammarError(ValidationError):
    """A schema, regex or grammar that is malformed, too costly, or cannot be served exactly.

    The message names what is refused and, in a JSON schema, the path to it (`#/properties/name`).
    """


class TemplateError(ValidationError):
    """The chat template raised, is missing, or took too long."""

    error_type = "template_error"


class ToolError(ValidationError):
    """Tools or a tool choice that cannot be followed."""

    error_type = "tool_error"


class Overloaded(RequestError):
    """Refused at once because the limit of requests is reached. `retry_after_s`: whole seconds, at least 1."""

    error_type = "overloaded"

    def __init__(self, message: str = "Model is overloaded", retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class GenerationError(RequestError):
    """The engine gave up on this request, or went away with it."""

    error_type = "generation"


class BatchError(GenerationError):
    """`tokenmill.LLM` answered some of several prompts only. `completions`: one a prompt, None where it failed;
    `errors`: why, by the prompt's place."""

    def __init__(self, completions: Sequence[Any], errors: Mapping[int, GenerationError]) -> None:
        self.completions, self.errors = list(completions), dict(errors)
        place, first = next(iter(self.errors.items()))
        failed = f"{len(errors)} of {len(completions)} prompts failed, the first at [{place}]: {first}"
        super().__init__(f"{failed}. The others' answers are in `completions`.")


class IncompleteError(RequestError):
    """The stream of tokens ended without a reason to finish."""

    error_type = "incomplete_generation"


class NotReady(RequestError):
    """Starting, draining or unhealthy. `phase` says which, in words."""

    error_type = "healthcheck"

    def __init__(self, phase: str = "unhealthy", retry_after_s: int = 1) -> None:
        super().__init__(phase)
        self.phase, self.retry_after_s = phase, retry_after_s
