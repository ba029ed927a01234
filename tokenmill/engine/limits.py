"""What a step and a sequence may be at most. Known before the first request."""

from __future__ import annotations

from dataclasses import dataclass

from tokenmill.wire.messages import Request


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What a step and a sequence may be at most. `block_size` is the pool's."""

    max_batch_tokens: int  # of a step
    max_batch_size: int  # sequences that run at once: slots
    max_total_tokens: int  # of a sequence, prompt and output
    block_size: int = 16  # tokens of a cache block
    min_chunk: int = 1  # a prompt is not cut into pieces smaller than this; what is left over waits for the next step
    prefill_beside: int = 0  # prompt tokens of a step in which others decode: so many and one more for each of them, so
    # that a long prompt holds them up little; at least `min_chunk`; more where many wait (see `Room.of`).
    # 0: as many as the step holds
    context_weight: int = 0  # at this position a prompt's token counts twice in `prefill_beside`, at double of it three
    # times and so on: its attention then costs as much as its products. 0: every token counts once

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
