"""The bodies of the `/v1` routes: OpenAI's, with TGI's extra fields.

A field that OpenAI documents is declared even if it is not supported, so that it is refused by name and not ignored.
Unknown fields are ignored. None: not given, or null.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from tokenmill.server.schema.receipts import Receipt

Uint = Annotated[int, msgspec.Meta(ge=0)]
Json = dict[str, Any]


def _(description: str) -> msgspec.Meta:
    """Return a field's description for the OpenAPI document."""
    return msgspec.Meta(description=description)


Text = str | None
Flag = bool | None
Whole = int | None
Number = float | None


class StreamOptions(msgspec.Struct, frozen=True):
    """Options of a stream."""

    include_usage: Annotated[Flag, _("One more chunk, without choices, has the usage.")] = None
    include_obfuscation: Annotated[Flag, _("Padding against traffic analysis; none is added either way.")] = None


class SamplingFields(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of both chats and completions. The last group is not OpenAI's, but TGI's, other servers' or this
    server's."""

    model: Annotated[Text, _("Repeated in the answer. Any name is served unless --strict-model-name is set.")] = None
    max_tokens: Annotated[
        Uint | None, _("Tokens to generate at most. Default: until the context is full; more than fit is an error.")
    ] = None
    temperature: Annotated[Number, _("Divides the logits; 0: the likeliest token is taken. Default 1.")] = None
    top_p: Annotated[Number, _("Keep the likeliest tokens that have this probability together; 1: off.")] = None
    stop: Annotated[
        str | list[str] | None, _("Strings that end the text, though not a thought, and are no part of it.")
    ] = None
    stream: Annotated[Flag, _("Send chunks as server-sent events.")] = None
    stream_options: Annotated[StreamOptions | None, _("Only with `stream`.")] = None
    seed: Annotated[Whole, _("Makes sampling repeatable; choice i uses seed + i. Default: drawn.")] = None
    n: Annotated[Whole, _("Choices to generate for each prompt. Default 1, at most 128.")] = None
    frequency_penalty: Annotated[Number, _("Subtracted from a token's logit for each time it was generated.")] = None
    presence_penalty: Annotated[Number, _("Subtracted from a token's logit once it was generated.")] = None
    logit_bias: Annotated[dict[str, float] | list[float] | None, _("By token id, added to its logit: -100 to 100.")] = (
        None
    )
    user: Annotated[Text, _("Changes nothing.")] = None

    repetition_penalty: Annotated[
        Number, _("Divides positive logits, multiplies negative ones, of tokens in prompt and answer. Default 1.")
    ] = None
    top_k: Annotated[Whole, _("Keep so many of the likeliest tokens; 0 or -1: all.")] = None
    min_p: Annotated[Number, _("Drop tokens that are less likely than this share of the likeliest.")] = None
    typical_p: Annotated[Number, _("Keep the tokens nearest to the expected surprise; 1: off.")] = None
    min_tokens: Annotated[Uint | None, _("No end of the text before so many tokens, by a stop string neither.")] = None
    ignore_eos: Annotated[Flag, _("Go on after the model's end of text.")] = None
    response_format: Annotated[
        Json | None,
        _("The answer's shape: `text`, `json_object`, `json_schema` as OpenAI has them; TGI's `json`, `regex` too."),
    ] = None
    guided_json: Annotated[Json | str | bool | None, _("A JSON schema that the answer follows.")] = None
    guided_regex: Annotated[Text, _("A regular expression that the answer matches as a whole.")] = None
    guided_choice: Annotated[list[str] | None, _("The answer is one of these texts.")] = None
    guided_grammar: Annotated[Text, _("A context-free grammar that the answer follows, as Lark or EBNF.")] = None
    structured_outputs: Annotated[
        Json | None, _("One of `json`, `regex`, `choice`, `grammar`, `json_object`: the same in one field.")
    ] = None
    truncate: Annotated[
        Uint | None, _("Keep so many of the prompt's last tokens; the usage has `truncated_tokens`, those cut off.")
    ] = None
    include_stop_str_in_output: Annotated[Flag, _("Leave the stop string in the text.")] = None
    receipt: Annotated[
        Flag, _("Add `receipt` to the answer or its last chunk: what it took, parameters as they held, digests.")
    ] = None


class ChatRequest(SamplingFields, frozen=True, kw_only=True):
    """Body of `/v1/chat/completions`. Fields that are not supported are refused by name."""

    messages: Annotated[list[Json], _("The conversation. A last message of the assistant is continued.")]
    max_completion_tokens: Annotated[Uint | None, _("The newer name of `max_tokens`; it has precedence.")] = None
    logprobs: Annotated[Flag, _("Log-probabilities of the tokens, before temperature and filters.")] = None
    top_logprobs: Annotated[Whole, _("So many of the likeliest tokens at each place, too: 0 to 20.")] = None
    tools: Annotated[list[Json] | None, _("Functions that the model may call, as OpenAI describes them.")] = None
    tool_choice: Annotated[
        str | Json | None,
        _('"auto", "none", "required", a function as OpenAI names it, just its name, or OpenAI\'s `allowed_tools`.'),
    ] = None
    tool_prompt: Annotated[
        Text, _("Put behind the last message; without it, a template that knows no tools gets a text of ours.")
    ] = None
    parallel_tool_calls: Annotated[Flag, _("false: an answer ends with its first call. Default true.")] = None
    metadata: Annotated[dict[str, str] | None, _("Changes nothing. At most 16 pairs, of 64 and 512 characters.")] = None
    store: Annotated[Flag, _("Refused if true: answers are not kept.")] = None
    service_tier: Annotated[
        Text, _("auto, default, flex, scale, priority: there is one, the answer says `default`.")
    ] = None
    safety_identifier: Annotated[Text, _("Changes nothing.")] = None
    prompt_cache_key: Annotated[Text, _("Changes nothing: equal beginnings are found without it.")] = None
    prompt_cache_retention: Annotated[Text, _('"in_memory"; others are refused.')] = None

    chat_template_kwargs: Annotated[Json | None, _("Further variables for the chat template.")] = None
    documents: Annotated[list[Json] | None, _("For chat templates that show documents.")] = None
    add_generation_prompt: Annotated[Flag, _("Begin the assistant's turn. Default: unless one is continued.")] = None
    continue_final_message: Annotated[Flag, _("Continue the last message. Default: if it is the assistant's.")] = None

    reasoning_effort: Annotated[
        Text, _('For chat templates that know it; "none" turns thinking off where a template can. Else refused.')
    ] = None
    thinking_budget: Annotated[
        Whole, _("Tokens that the model may think; then its thought is ended. For models that think.")
    ] = None
    verbosity: Annotated[Text, _("For chat templates that know it; else refused.")] = None

    functions: Annotated[list[Json] | None, _("The older form of `tools`; the answer has a `function_call`.")] = None
    function_call: Annotated[str | Json | None, _("The older form of `tool_choice`.")] = None
    modalities: Annotated[list[str] | None, _('["text"]; others are refused.')] = None
    audio: Annotated[Any, _("Refused: only text is generated.")] = None
    prediction: Annotated[Any, _("Refused for now.")] = None
    web_search_options: Annotated[Any, _("Refused.")] = None


class CompletionRequest(SamplingFields, frozen=True, kw_only=True):
    """Body of `/v1/completions`."""

    prompt: Annotated[str | list[Any], _("A text, token ids, or a list of either.")]
    best_of: Annotated[Whole, _("Generate so many for each prompt, return the `n` with the likeliest tokens.")] = None
    echo: Annotated[Flag, _("Put the prompt before the text; with `logprobs`, its tokens too.")] = None
    logprobs: Annotated[Whole, _("Log-probabilities of the tokens and so many of the likeliest: 0 to 5.")] = None
    suffix: Annotated[Text, _("Refused.")] = None


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a whole call. A prompt shared by several choices counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]
    completion_tokens_details: dict[str, int] | msgspec.UnsetType = msgspec.UNSET  # of models that think


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
    """Log-probabilities of an answer, one entry for each token."""

    content: list[TokenLogprob]


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Parallel lists, one entry for each token. `text_offset`: in characters from the beginning of `text`."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True):
    """A function's name and a piece of its arguments, as JSON text. In a stream the name is in the first piece only."""

    name: str | msgspec.UnsetType = msgspec.UNSET
    arguments: str


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call of a function. In a stream calls are told apart by `index`, and only a call's first piece has id and
    type."""

    index: int | msgspec.UnsetType = msgspec.UNSET
    id: str | msgspec.UnsetType = msgspec.UNSET
    type: str | msgspec.UnsetType = msgspec.UNSET
    function: CalledFunction


class ChatMessage(msgspec.Struct, frozen=True):
    """The assistant's text, thought and calls. `reasoning` equals `reasoning_content`, because clients look for either.
    In a stream only a choice's first delta has the role, because clients add deltas up."""

    role: str | msgspec.UnsetType
    content: str | msgspec.UnsetType | None = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    reasoning: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET
    function_call: CalledFunction | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatCompletion(msgspec.Struct, frozen=True):
    """A whole answer of `/v1/chat/completions`."""

    object: str
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    service_tier: str | msgspec.UnsetType = msgspec.UNSET  # only if the request has one
    receipt: Receipt | msgspec.UnsetType = msgspec.UNSET  # only if requested


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """One token's part of one answer."""

    index: int
    delta: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatChunk(msgspec.Struct, frozen=True):
    """One event of a chat stream. The last one, if usage was requested, has no choices."""

    object: str
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None
    service_tier: str | msgspec.UnsetType = msgspec.UNSET  # only if the request has one
    receipt: Receipt | msgspec.UnsetType = msgspec.UNSET  # only if requested


class CompletionChoice(msgspec.Struct, frozen=True):
    """One text, or one token's part of it, whose `finish_reason` is null until the last."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class Completion(msgspec.Struct, frozen=True):
    """A whole answer of `/v1/completions`, or one event of its stream."""

    object: str
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None
    receipt: Receipt | msgspec.UnsetType = msgspec.UNSET  # only if requested


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
    """Any error of a `/v1` route. `error_type`: TGI's name of the kind."""

    error: ErrorDetails
    error_type: str
