"""The bodies of the routes that cloud platforms prescribe: Vertex AI's and KServe's (Open Inference Protocol v2)."""

from __future__ import annotations

from typing import Any

import msgspec

from tokenmill.server.schema.native import GenerateParameters


class VertexRequest(msgspec.Struct, frozen=True):
    """Body of `/vertex`. An instance has `inputs` and maybe `parameters`, or it is a chat body.

    `parameters` apply to instances with `inputs` that have none of their own.
    """

    instances: list[dict[str, Any]]
    parameters: GenerateParameters | None = None


class VertexInstance(msgspec.Struct, frozen=True):
    """An instance that is a plain prompt."""

    inputs: str
    parameters: GenerateParameters | None = None


class VertexResponse(msgspec.Struct, frozen=True):
    """The texts, in the order of the instances."""

    predictions: list[str]


class KserveInput(msgspec.Struct, frozen=True):
    """A prompt: the bytes of its UTF-8 text as numbers, or one string, as the protocol writes BYTES in JSON."""

    name: str
    shape: list[int]
    datatype: str
    data: list[int | str]


class KserveOutputName(msgspec.Struct, frozen=True):
    """Name of a requested output."""

    name: str


class KserveRequest(msgspec.Struct, frozen=True):
    """Body of `/v2/models/{name}/versions/{version}/infer`: inputs, each a prompt, and a name for each answer."""

    inputs: list[KserveInput]
    outputs: list[KserveOutputName]
    id: str = ""
    parameters: GenerateParameters | None = None


class KserveOutput(msgspec.Struct, frozen=True):
    """An answer: the bytes of its UTF-8 text as numbers."""

    name: str
    shape: list[int]
    datatype: str
    data: list[int]


class KserveResponse(msgspec.Struct, frozen=True):
    """The answers, in the order of the inputs."""

    id: str
    outputs: list[KserveOutput]


class KserveServer(msgspec.Struct, frozen=True):
    """Answer of `/v2`."""

    name: str
    version: str
    extensions: list[str]


class KserveLive(msgspec.Struct, frozen=True):
    """Answer of the health routes below `/v2`."""

    live: bool
