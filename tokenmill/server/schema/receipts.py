"""What a receipt holds. How one is made: `server/receipt.py`."""

from __future__ import annotations

from typing import Any

import msgspec


class SequenceReceipt(msgspec.Struct, frozen=True):
    """One of several sequences of an answer; see `Receipt`. `index`: its place among those that were generated."""

    index: int
    prompt: int
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
    """What an answer took and what made it.

    Times in milliseconds: in the queue, until the first token, from the first to the last token; the longest of
    all sequences, which run side by side. `total_ms` from the request's arrival to its last token. Tokens of a prompt
    count once however many choices it has. `largest_batch`: the most sequences that shared a step with this answer.
    `forced_tokens`: of the generated ones, those in whose places nothing else could stand, so that none was sampled.
    `parameters`: as they held, after defaults and limits.
    """

    request_id: str
    model: str
    model_revision: str | None
    model_digest: str  # of what the files of the model hold
    engine: str
    engine_digest: str  # changes when the same model may compute other numbers
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
