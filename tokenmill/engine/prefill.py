"""Division of a step's prefill budget among prompts, and admission of waiting sequences.

The shortest prompts come first, by size class and then by arrival, but the oldest prompt gets at least half of the
budget. Every prompt becomes the oldest eventually. So none starves, and none takes longer than twice the work of itself
and all earlier ones.

Partly computed prompts cannot deadlock: the oldest is never preempted, and a prompt has blocks for all its tokens from
its admission on. Tables with a window are the exception: there it has blocks for the largest step, and the scheduler
allocates those of the following step, for which it may preempt younger sequences.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.budget import PrefillBudget
from tokenmill.engine.limits import SchedulerLimits
from tokenmill.engine.prefixes import Hit, PrefixCache
from tokenmill.engine.running import Running
from tokenmill.engine.sequence import Int32, Sequence
from tokenmill.engine.tables import Tables
from tokenmill.engine.waiting import Prompt, Waiting

_MAX_PASSED_OVER = 8  # per size class: sequences that may wait for another's prefix without delaying later ones


@dataclass(slots=True)
class StepPlan:
    """Plan of a step after its decoding rows: the budget of the prompts, and their numbers of tokens."""

    limits: SchedulerLimits
    max_tokens: int
    budget: PrefillBudget
    starts: Int32  # by running row: first position to compute
    wanted: Int32  # by running row: uncomputed tokens
    counts: Int32  # by running row: tokens to compute in this step
    may_admit: bool
    spare_blocks: int  # blocks that the sequences admitted from now on may hold
    admitted: dict[Sequence, int] = field(default_factory=dict)  # tokens to compute of each newly admitted sequence

    def min_chunk(self, wanted: int) -> int:
        """Return the minimum chunk of a prompt with `wanted` uncomputed tokens."""
        return max(1, min(wanted, self.limits.min_chunk, self.max_tokens))


class Prefill:
    """Rule that divides steps among prompts. It has no state of its own."""

    def __init__(
        self, pool: BlockPool, tables: Tables, waiting: Waiting, running: Running, prefixes: PrefixCache
    ) -> None:
        self._pool, self._tables, self._waiting, self._running, self._prefixes = (
            pool, tables, waiting, running, prefixes,
        )  # fmt: skip

    def queue(self, seq: Sequence, limits: SchedulerLimits) -> None:
        """Queue `seq` by the number of its uncached tokens."""
        start = self._prefixes.match(seq).length * self._pool.block_size
        self._waiting.add(seq, limits.size_class(start, len(seq.token_ids) - start))

    def divide(self, step: StepPlan, rows: list[int]) -> None:
        """Divide the rest of a step among the prompts in `rows` and waiting sequences, which it may admit.

        Sets `step.counts` and `step.admitted`. No prompt is computed after a truncated one.
        """
        prompts = [Prompt(step.limits.size_class(int(step.starts[row]), int(step.wanted[row])), seq.arrival, seq, row)
                   for row in rows if (seq := self._running.rows[row]).slot >= 0]  # fmt: skip
        begun = [prompt for prompt in prompts if step.starts[prompt.row] < prompt.seq.prefill_end]
        oldest = min(begun, key=lambda prompt: prompt.arrival, default=None)
        self._prefixes.computing = [prompt.seq for prompt in begun]
        queue: Iterable[Prompt] = ()
        if step.may_admit:
            admitted = self._admit_oldest(step, oldest)
            if admitted:
                oldest = admitted
                prompts.append(admitted)
            queue = self._waiting.shortest_first(min(self._running.num_free, step.budget.tokens) + _MAX_PASSED_OVER)
        if oldest:
            step.budget.reserve(*self._remaining(step, oldest))
        reserved = oldest
        for prompt in heapq.merge(sorted(prompts), queue):
            if prompt is reserved:
                step.budget.release()
                reserved = None
            if not self._plan_chunk(step, prompt):
                break
        if reserved:
            step.budget.release()
            self._plan_chunk(step, reserved)

    def _admit_oldest(self, step: StepPlan, oldest: Prompt | None) -> Prompt | None:
        """Admit the oldest waiting sequence, if it is older than `oldest`, before others take slots or blocks.

        If too few blocks are free, others may pass it, but may not take blocks that it needs. So it is admitted at the
        latest when the running sequences that are older have ended.
        """
        for head in self._waiting.heads():
            if self._prefixes.has_more(head):
                self._waiting.remove(head)
                self.queue(head, step.limits)
        seq = self._waiting.oldest()
        if seq is None or (oldest and oldest.arrival < seq.arrival):
            return None
        hit = self._prefixes.match(seq)
        if self._prefixes.is_being_computed(seq, hit.length):
            return None
        if self._admit(step, seq, hit):
            start = self._running.computed_of(seq)
            return Prompt(step.limits.size_class(start, seq.num_tokens - start), seq.arrival, seq)
        younger = sum(other.num_blocks for other in self._running.values() if other.arrival > seq.arrival)
        need = self._tables.blocks_of(len(seq.token_ids)) + self._pool.num_blocks // 8
        step.spare_blocks = 0 if seq.num_preemptions else self._pool.num_blocks - need - younger
        return None

    def _remaining(self, step: StepPlan, prompt: Prompt) -> tuple[int, int, bool]:
        """Return the first uncomputed position of an admitted prompt, its uncomputed tokens, and if it ran before."""
        if prompt.row >= 0:
            return int(step.starts[prompt.row]), int(step.wanted[prompt.row]), True
        start = self._running.computed_of(prompt.seq)
        return start, prompt.seq.num_tokens - start, False

    def _plan_chunk(self, step: StepPlan, prompt: Prompt) -> bool:
        """Plan a chunk of a prompt, which is admitted if it waits. Return False if no later prompt may be computed."""
        seq = prompt.seq
        if seq.slot < 0:
            if not step.may_admit:
                return True
            hit = self._prefixes.match(seq)
            if self._prefixes.is_being_computed(seq, hit.length):
                return True
            step.may_admit = self._admit(step, seq, hit)
            if not step.may_admit:
                return True
        start, wanted, begun = self._remaining(step, prompt)
        count = step.budget.fit(start, wanted, begun)
        if count < (step.min_chunk(wanted) if start < seq.prefill_end else 1):
            return False
        step.budget.take(start, count)
        if prompt.row >= 0:
            step.counts[prompt.row] = count
        else:
            step.admitted[seq] = count
        return count == wanted

    def _admit(self, step: StepPlan, seq: Sequence, hit: Hit) -> bool:
        """Admit a waiting sequence: assign a slot, its cached prefix `hit`, and blocks for all its tokens.

        Return False, without a change, if it must wait: a few blocks must stay free, so that running sequences do not
        preempt it in the next steps, and each step must have room for a chunk beside all sequences that decode.
        """
        num_tokens, pool = len(seq.token_ids), self._pool
        if num_tokens < seq.num_tokens or not self._running.num_free:  # its last token may be on the device
            return False
        start = hit.length * pool.block_size
        min_chunk = step.min_chunk(num_tokens - start)
        if step.budget.fit(start, num_tokens - start) < min_chunk:
            return False
        if self._prefixes.computing and len(self._running) + step.min_chunk(num_tokens) > step.max_tokens:
            return False
        blocks, cached = self._tables.blocks_of(num_tokens), hit.all
        need = blocks - len(cached)
        reserve = min(len(self._running), pool.num_blocks // 8)
        if blocks > step.spare_blocks or need + reserve > pool.num_free - pool.unused(cached):
            return False
        step.spare_blocks -= blocks
        self._waiting.remove(seq)
        self._running.start(seq, hit)
        grown = self._running.grow(seq, num_tokens)
        assert grown, "the most that it may hold is free"
        self._prefixes.computing.append(seq)
        return True
