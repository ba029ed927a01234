"""The bodies of TGI's own routes: `/generate`, `/generate_stream`, `/`, `/tokenize`, `/chat_tokenize`, `/info`.

Unknown fields are ignored at every level, as TGI does; null stands for the default.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from tokenmill.server.schema.receipts import Receipt

Uint = Annotated[int, msgspec.Meta(ge=0)]


def _(description: str) -> msgspec.Meta:
    """Return a field's description for the OpenAPI document."""
    return msgspec.Meta(description=description)


class GenerateParameters(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters of a generation. None: not given. TGI does not have the last group."""

    best_of: Annotated[Uint | None, _("Sequences to generate; the one with the likeliest tokens is returned.")] = None
    temperature: Annotated[float | None, _("Divides the logits; 0: the likeliest token is taken. Default 1.")] = None
    repetition_penalty: Annotated[
        float | None, _("Divides positive logits, multiplies negative ones, of tokens in prompt and answer. Default 1.")
    ] = None
    frequency_penalty: Annotated[float | None, _("Subtracted from a token's logit for each time it was generated.")] = (
        None
    )
    top_k: Annotated[int | None, _("Keep so many of the likeliest tokens.")] = None
    top_p: Annotated[float | None, _("Keep the likeliest tokens that have this probability together; 1: off.")] = None
    typical_p: Annotated[float | None, _("Keep the tokens nearest to the expected surprise; 1: off.")] = None
    do_sample: Annotated[bool | None, _("Sample. On by itself with temperature, top_k, top_p or typical_p.")] = None
    max_new_tokens: Annotated[Uint | None, _("Tokens to generate at most. Default: until the context is full.")] = None
    return_full_text: Annotated[bool | None, _("Put the prompt before the text. Default: false; true on POST /.")] = (
        None
    )
    stop: Annotated[str | list[str] | None, _("Strings that end the text, which they are part of.")] = None
    truncate: Annotated[Uint | None, _("Keep so many of the prompt's last tokens.")] = None
    watermark: Annotated[bool | None, _("Mark the text statistically, as the server's options set.")] = None
    details: Annotated[bool | None, _("Say how the text ended, and each token.")] = None
    decoder_input_details: Annotated[bool | None, _("Say each token of the prompt, too. Not in streams.")] = None
    seed: Annotated[Uint | None, _("Makes sampling repeatable. Default: drawn.")] = None
    top_n_tokens: Annotated[Uint | None, _("Say so many of the likeliest tokens at each place.")] = None
    grammar: Annotated[
        dict[str, Any] | None, _("What the answer follows: `type` json, json_schema or regex, and `value`.")
    ] = None
    adapter_id: Annotated[str | None, _("Name of a LoRA adapter. None are loaded yet: refused.")] = None

    min_p: Annotated[float | None, _("Drop tokens that are less likely than this share of the likeliest.")] = None
    presence_penalty: Annotated[float | None, _("Subtracted from a token's logit once it was generated.")] = None
    min_new_tokens: Annotated[Uint | None, _("No end of the text before so many tokens.")] = None
    ignore_eos: Annotated[bool | None, _("Go on after the model's end of text.")] = None


class GenerateRequest(msgspec.Struct, frozen=True):
    """Body of `/generate`, `/generate_stream` and `/tokenize`. `receipt`: add a receipt to the answer; not TGI's."""

    inputs: str
    parameters: GenerateParameters | None = None
    receipt: bool | None = None


class CompatRequest(GenerateRequest, frozen=True):
    """Body of POST `/`: that of `/generate`, and `stream`."""

    stream: bool | None = None


class Token(msgspec.Struct, frozen=True):
    """A generated token, or one of its alternatives in `top_tokens`."""

    id: int
    text: str
    logprob: float
    special: bool


class PrefillToken(msgspec.Struct, frozen=True):
    """A token of the prompt. The first has no log-probability, because nothing precedes it."""

    id: int
    text: str
    logprob: float | None


class BestOfSequence(msgspec.Struct, frozen=True, kw_only=True):
    """A sequence that `best_of` did not choose. `top_tokens` is absent unless requested."""

    generated_text: str
    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | msgspec.UnsetType = msgspec.UNSET


class Details(msgspec.Struct, frozen=True, kw_only=True):
    """Details of a whole answer, with `details: true`. The last two are absent unless requested."""

    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    best_of_sequences: list[BestOfSequence] | msgspec.UnsetType = msgspec.UNSET
    top_tokens: list[list[Token]] | msgspec.UnsetType = msgspec.UNSET


class GenerateResponse(msgspec.Struct, frozen=True):
    """A whole answer. `details` is absent, not null, unless requested."""

    generated_text: str
    details: Details | msgspec.UnsetType = msgspec.UNSET
    receipt: Receipt | msgspec.UnsetType = msgspec.UNSET  # only if requested


class StreamDetails(msgspec.Struct, frozen=True):
    """Details in the last event of a stream, with `details: true`."""

    finish_reason: str
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamResponse(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a stream, for one token. The last one has the whole text."""

    index: int
    token: Token
    top_tokens: list[Token] | msgspec.UnsetType = msgspec.UNSET
    generated_text: str | None = None
    details: StreamDetails | None = None


class SimpleToken(msgspec.Struct, frozen=True):
    """A token of `/tokenize`: the slice [start, stop) of the input's UTF-8 bytes."""

    id: int
    text: str
    start: int
    stop: int


class ChatTokenizeResponse(msgspec.Struct, frozen=True):
    """Answer of `/chat_tokenize`: the prompt that the chat template makes, and its tokens."""

    tokenize_response: list[SimpleToken]
    templated_text: str


class ErrorResponse(msgspec.Struct, frozen=True):
    """Any error of a native route."""

    error: str
    error_type: str


class Info(msgspec.Struct, frozen=True, kw_only=True):
    """Body of `/info`. The last group is of older TGI versions, which some clients still look for, or not TGI's."""

    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None

    model_dtype: str
    model_device_type: str
    max_batch_total_tokens: int
    max_input_length: int
    prefix_caching: bool
    backend: str
    weights: Annotated[list[str], _("Forms of matrices: their number, how they are stored, how products read them.")]
