"""Limits of a step and of a sequence, fixed at the start."""

from __future__ import annotations

from dataclasses import dataclass

from tokenmill.engine.tables import Tables
from tokenmill.wire.messages import Request


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Limits of a step and of a sequence. `block_size` equals that of the block pool."""

    max_batch_tokens: int  # of a step
    max_batch_size: int  # sequences that run at the same time: number of slots
    max_total_tokens: int  # of a sequence: prompt and output
    block_size: int = 16  # tokens of a cache block
    min_chunk: int = 1  # minimum tokens of a chunk; a prompt that would get fewer waits for the next step
    # Prompt tokens of a step in which n sequences decode: `prefill_beside` + n, so that a long prompt delays them
    # little. At least `min_chunk`; more if many sequences wait (see `PrefillBudget.of`). 0: limited by the step only.
    prefill_beside: int = 0
    # Maximum tokens of a chunk that does not finish its prompt, so that a request that arrives meanwhile waits for
    # short steps only. Weighted like `prefill_beside`; at least `min_chunk`. 0: limited by the step only.
    max_chunk: int = 0
    # Position at which the attention of a prompt token costs as much as its products. A token at position p counts as
    # 1 + p / `context_weight` tokens in `prefill_beside` and `max_chunk`. 0: every token counts as one.
    context_weight: int = 0
    # False: a sequence is computed from its first token on, because blocks do not hold all that later tokens need.
    shares_prefixes: bool = True
    # By block table of a sequence: tokens that a token attends to there, its own included. 0: all tokens.
    windows: tuple[int, ...] = (0,)
    # Steps on the device at the same time. A sequence is decoded in every `stride`-th step, or once its last token has
    # arrived, so no step waits for the tokens of one that is still being computed.
    stride: int = 1

    @property
    def tables(self) -> Tables:
        """Block tables of every sequence."""
        return Tables.of(self.windows, self.block_size, self.max_batch_tokens)

    def weigh(self, start: int, count: int) -> int:
        """Return the cost of `count` tokens of a prompt from position `start` on, in tokens at position 0."""
        weight = self.context_weight
        return count + count * (2 * start + count - 1) // (2 * weight) if weight else count

    def size_class(self, start: int, count: int) -> int:
        """Return the size class of a prompt with `count` uncomputed tokens from `start` on.

        Classes are costs of 1, 2-3, 4-7, … tokens at position 0.
        """
        return self.weigh(start, count).bit_length()

    def refusal(self, request: Request, num_blocks: int) -> str:
        """Return the reason why a request can never run with `num_blocks` cache blocks; "" if it can."""
        prompt, wanted = len(request.prompt_ids), request.stopping.max_new_tokens
        if prompt < 1 or wanted < 1:
            return f"a request needs at least one prompt token and one new token; it has {prompt} and wants {wanted}"
        if len(request.output_ids) >= wanted:
            return f"the request has all of its {wanted} new tokens already"
        if prompt + wanted > self.max_total_tokens:
            return (
                f"the request needs {prompt + wanted} tokens ({prompt} of the prompt, {wanted} new ones); "
                f"a sequence may have {self.max_total_tokens}"
            )
        if self.tables.blocks_of(prompt + wanted - 1) > num_blocks:
            capacity = self.tables.longest(num_blocks, self.max_total_tokens)
            return (
                f"the request needs room for {prompt + wanted - 1} tokens in the cache, which holds {capacity}; "
                "ask for fewer tokens, or give the server more memory"
            )
        return ""
