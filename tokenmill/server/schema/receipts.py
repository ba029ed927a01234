"""Types of a receipt, which `server/receipt.py` makes."""

from __future__ import annotations

from typing import Any

import msgspec


class SequenceReceipt(msgspec.Struct, frozen=True):
    """One of several sequences of an answer; see `Receipt`. `index`: its place among the generated ones; `engine`: the
    number of the engine that ended it."""

    index: int
    prompt: int
    engine: int
    resumed: int
    seed: int | None
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    forced_tokens: int
    queue_ms: float
    prefill_ms: float
    decode_ms: float
    preemptions: int
    largest_batch: int


class Receipt(msgspec.Struct, frozen=True):
    """Timings, token counts, parameters and digests of an answer.

    Times are in milliseconds: in the queue, until the first token, from the first to the last token. Sequences run side
    by side, so each is that of the slowest one. `total_ms`: from the request's arrival to its last token. Tokens of a
    prompt count once however many choices it has. `largest_batch`: the most sequences that shared a step with this
    answer. `forced_tokens`: generated tokens that were the only possible ones, so that none was sampled. `parameters`:
    as used, after defaults and limits. `engines`: numbers of the engines that ended the sequences. `resumed`: how often
    an engine stopped and another one went on.
    """

    request_id: str
    model: str
    model_revision: str | None
    model_digest: str  # of the contents of the model's files
    engine: str
    engine_digest: str  # changes when the same model may compute other numbers
    engines: list[int]
    resumed: int
    version: str
    queue_ms: float
    prefill_ms: float
    decode_ms: float
    total_ms: float
    prompt_tokens: int
    truncated_tokens: int
    cached_tokens: int
    generated_tokens: int
    forced_tokens: int
    preemptions: int
    largest_batch: int
    parameters: dict[str, Any]
    sequences: list[SequenceReceipt] | msgspec.UnsetType = msgspec.UNSET  # if there are several
