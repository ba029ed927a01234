"""The options of one generation, as any API gives them, and the limits that a server sets."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Dialect = Literal["native", "openai"]
"""The API whose names and messages an error has: TGI's native routes, or OpenAI's."""


class ThoughtLimit(msgspec.Struct, frozen=True):
    """Forced end of a thought whose budget is spent; see `wire.messages.StoppingParams`.

    `force_after` is at least 1, because there 0 means never: a thought that may have no token is closed in the prompt.
    """

    force_after: int
    forced_ids: tuple[int, ...]
    unless: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        assert self.force_after > 0


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Options of one generation, unchecked; None: not given."""

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logit_bias: dict[int, float] | None = None
    logprobs: int | None = None  # of the chosen token and of this many of the likeliest
    raw_logprobs: bool | None = None  # of the model's own distribution, as OpenAI's routes return them
    prompt_logprobs: int | None = None  # the same for the prompt's tokens
    truncate: int | None = None  # keep this many of the prompt's last tokens
    best_of: int | None = None
    watermark: bool = False
    adapter_id: str | None = None
    grammar: Any = None  # a `GrammarSpec`, or {"type", "value"} as on native routes
    grammar_field: str = "grammar"  # the request's field that has the grammar, for messages
    thinking_budget: int | None = None  # tokens after which a thought is ended, as `thought` describes
    thought: ThoughtLimit | None = None


class RequestLimits(msgspec.Struct, frozen=True):
    """Limits of one request, set by the server. `vocab_size`: number of the model's token ids, which begin at 0.
    `watermark_gamma`, `watermark_delta`: the share of the vocabulary that a watermark favours, and its added logit."""

    max_input_tokens: int
    max_total_tokens: int
    max_stop_sequences: int
    max_best_of: int
    max_top_n_tokens: int
    vocab_size: int
    watermark_gamma: float = 0.5
    watermark_delta: float = 2.0
    grammars: bool = False  # True: requests may have a grammar
