"""The bodies of the `/v1` routes: OpenAI's, with TGI's extra fields.

A field that OpenAI documents is here even where it is refused, so that it is refused by its name and never ignored.
Unknown fields are ignored. None: not given, or null.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

Uint = Annotated[int, msgspec.Meta(ge=0)]
Json = dict[str, Any]


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream carries besides the text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis; none is added


class SamplingFields(msgspec.Struct, frozen=True, kw_only=True):
    """What chat and completions have in common."""

    model: str | None = None
    max_tokens: Uint | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = None
    n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | list[float] | None = None
    user: str | None = None

    # TGI's and other servers' extras
    repetition_penalty: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    min_tokens: Uint | None = None
    ignore_eos: bool | None = None
    response_format: Json | None = None
    truncate: Uint | None = None  # keep only so many of the prompt's last tokens; the usage says how many were cut
    include_stop_str_in_output: bool | None = None
    receipt: bool | None = None  # what the answer took and how it was made, in the answer or its last chunk


class ChatRequest(SamplingFields, frozen=True, kw_only=True):
    """Body of `/v1/chat/completions`."""

    messages: list[Json]
    max_completion_tokens: Uint | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Json] | None = None
    tool_choice: str | Json | None = None
    tool_prompt: str | None = None
    parallel_tool_calls: bool | None = None
    metadata: Json | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None  # there is one tier
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None  # equal beginnings are found without it
    prompt_cache_retention: str | None = None

    chat_template_kwargs: Json | None = None
    documents: list[Json] | None = None  # for templates that show documents
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    reasoning_effort: str | None = None  # given to templates that know it
    verbosity: str | None = None  # the same

    # documented by OpenAI, refused by name
    functions: Any = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None


class CompletionRequest(SamplingFields, frozen=True, kw_only=True):
    """Body of `/v1/completions`. `prompt`: a text, token ids, or a list of either."""

    prompt: str | list[Any]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a whole call; a prompt shared by several choices counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class TopLogprob(msgspec.Struct, frozen=True):
    """One of the likeliest tokens at a position."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(msgspec.Struct, frozen=True):
    """The chosen token of a position and the likeliest ones."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """One entry a token."""

    content: list[TokenLogprob]


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Parallel lists, one entry a token. `text_offset` in characters from the beginning of `text`."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class ChatMessage(msgspec.Struct, frozen=True):
    """What the assistant said."""

    role: str
    content: str


class ChatChoice(msgspec.Struct, frozen=True):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatCompletion(msgspec.Struct, frozen=True):
    """A plain answer of `/v1/chat/completions`."""

    object: str
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    service_tier: str | msgspec.UnsetType = msgspec.UNSET  # only if the request named one


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """What one token adds to one answer."""

    index: int
    delta: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatChunk(msgspec.Struct, frozen=True):
    """One event of a chat stream. The last one, if usage was asked for, has no choices."""

    object: str
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None
    service_tier: str | msgspec.UnsetType = msgspec.UNSET  # only if the request named one


class CompletionChoice(msgspec.Struct, frozen=True):
    """One text, or what one token adds to it (then `finish_reason` is null until the last)."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class Completion(msgspec.Struct, frozen=True):
    """A plain answer of `/v1/completions`, or one event of its stream."""

    object: str
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None


class Model(msgspec.Struct, frozen=True):
    """A model in the list of `/v1/models`."""

    id: str
    object: str
    created: int
    owned_by: str


class ModelList(msgspec.Struct, frozen=True):
    """Body of `/v1/models`."""

    object: str
    data: list[Model]


class ErrorDetails(msgspec.Struct, frozen=True):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(msgspec.Struct, frozen=True):
    """Any error of a `/v1` route; `error_type` is TGI's name of the kind."""

    error: ErrorDetails
    error_type: str
