"""Limits of a step and of a sequence, known before the first request."""

from __future__ import annotations

from dataclasses import dataclass

from tokenmill.wire.messages import Request


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Limits of a step and of a sequence. `block_size` is the pool's."""

    max_batch_tokens: int  # of a step
    max_batch_size: int  # sequences that run at once: slots
    max_total_tokens: int  # of a sequence, prompt and output
    block_size: int = 16  # tokens of a cache block
    min_chunk: int = 1  # a prompt is not cut into pieces smaller than this; what is left over waits for the next step
    prefill_beside: int = 0  # prompt tokens of a step in which others decode: so many and one more for each of them, so
    # that a long prompt holds them up little; at least `min_chunk`; more where many wait (see `PrefillBudget.of`).
    # 0: as many as the step holds
    max_chunk: int = 0  # a prompt that a step does not finish gets no more of it, counted as in `prefill_beside`: one
    # that arrives meanwhile waits for short steps only; at least `min_chunk`. 0: as many as the step holds
    context_weight: int = 0  # at this position a prompt's token counts twice in `prefill_beside`, at double of it three
    # times and so on: its attention then costs as much as its products. 0: every token counts once

    def weigh(self, start: int, count: int) -> int:
        """Return the cost of `count` tokens of a prompt from position `start` on, in tokens at position 0."""
        weight = self.context_weight
        return count + count * (2 * start + count - 1) // (2 * weight) if weight else count

    def size_class(self, start: int, count: int) -> int:
        """Return the size class, 1, 2-3, 4-7, …, of a prompt that lacks so many tokens from `start` on."""
        return self.weigh(start, count).bit_length()

    def refusal(self, request: Request, num_blocks: int) -> str:
        """Why this request can never run where there are so many cache blocks; "" if it can."""
        prompt, wanted = len(request.prompt_ids), request.stopping.max_new_tokens
        if prompt < 1 or wanted < 1:
            return f"a request needs at least one prompt token and one new token; it has {prompt} and wants {wanted}"
        if prompt + wanted > self.max_total_tokens:
            return (
                f"the request needs {prompt + wanted} tokens ({prompt} of the prompt, {wanted} new ones); "
                f"a sequence may have {self.max_total_tokens}"
            )
        capacity = num_blocks * self.block_size
        if prompt + wanted - 1 > capacity:
            return (
                f"the request needs room for {prompt + wanted - 1} tokens in the cache, which holds {capacity}; "
                "ask for fewer tokens, or give the server more memory"
            )
        return ""
