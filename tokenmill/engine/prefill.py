"""The share of each prompt in a step, and the admission of those that wait.

The shortest come first, by size class and then by arrival, but the oldest gets half of what there is at least,
whoever else comes. In the order of arrival every prompt becomes the oldest: none starves, and none waits longer than
twice the time of all before it. A prompt has blocks for all its tokens from its admission on, and the oldest is never
preempted: several prompts in the middle cannot hold up each other for ever.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.budget import PrefillBudget
from tokenmill.engine.limits import SchedulerLimits
from tokenmill.engine.prefixes import PrefixCache
from tokenmill.engine.running import Running
from tokenmill.engine.sequence import Int32, Sequence
from tokenmill.engine.waiting import Prompt, Waiting

_PASSED_OVER = 8  # of a line: sequences that wait for another's prefix and do not hold up those behind them


@dataclass(slots=True)
class Step:
    """A step of which decoding rows have got their part: what prompts may take, and what they are given."""

    limits: SchedulerLimits
    max_tokens: int
    room: PrefillBudget
    starts: Int32  # of the running rows
    wanted: Int32
    counts: Int32
    may_admit: bool
    spare: int  # blocks that sequences admitted in it may hold
    fresh: dict[Sequence, int] = field(default_factory=dict)  # admitted, and their counts

    def least(self, wanted: int) -> int:
        """Return the smallest piece of a prompt that lacks so many tokens."""
        return max(1, min(wanted, self.limits.min_chunk, self.max_tokens))


class Prefill:
    """The rule that shares out steps among prompts."""

    def __init__(self, pool: BlockPool, waiting: Waiting, running: Running, prefixes: PrefixCache) -> None:
        self._pool, self._waiting, self._running, self._prefixes = pool, waiting, running, prefixes

    def queue(self, seq: Sequence, limits: SchedulerLimits) -> None:
        """Let `seq` wait, in the line of what of it is not cached."""
        start = len(self._prefixes.find(seq)) * self._pool.block_size
        self._waiting.add(seq, limits.size_class(start, len(seq.token_ids) - start))

    def share(self, step: Step, rows: list[int]) -> None:
        """Set the counts of `rows`, which want more than a token, and of sequences that it admits.

        Nothing is computed behind one that is cut.
        """
        prompts = [Prompt(step.limits.size_class(int(step.starts[row]), int(step.wanted[row])), seq.arrival, seq, row)
                   for row in rows if (seq := self._running.rows[row]).slot >= 0]  # fmt: skip
        begun = [prompt for prompt in prompts if step.starts[prompt.row] < prompt.seq.fill_end]
        oldest = min(begun, key=lambda prompt: prompt.arrival, default=None)
        self._prefixes.computing = [prompt.seq for prompt in begun]
        queue: Iterable[Prompt] = ()
        if step.may_admit:
            admitted = self._admit_oldest(step, oldest)
            if admitted:
                oldest = admitted
                prompts.append(admitted)
            queue = self._waiting.shortest_first(min(self._running.num_free, step.room.tokens) + _PASSED_OVER)
        if oldest:
            step.room.hold(*self._missing(step, oldest))
        held = oldest
        for prompt in heapq.merge(sorted(prompts), queue):
            if prompt is held:
                step.room.release()
                held = None
            if not self._serve(step, prompt):
                break
        if held:
            step.room.release()
            self._serve(step, held)

    def _admit_oldest(self, step: Step, oldest: Prompt | None) -> Prompt | None:
        """Admit the sequence that waits longest, if it is older than `oldest`, before any other takes slot or blocks.

        If it lacks blocks, others may pass it, but of the blocks that it needs they take none: those that run and are
        older than it end some day, and then it has them.
        """
        for head in self._waiting.heads():
            if self._prefixes.has_more(head):
                self._waiting.remove(head)
                self.queue(head, step.limits)
        seq = self._waiting.oldest()
        if seq is None or (oldest and oldest.arrival < seq.arrival):
            return None
        found = self._prefixes.find(seq)
        if self._prefixes.comes(seq, len(found)):
            return None
        if self._admit(step, seq, found):
            start = self._running.computed_of(seq)
            return Prompt(step.limits.size_class(start, seq.num_tokens - start), seq.arrival, seq)
        younger = sum(len(other.blocks) for other in self._running.values() if other.arrival > seq.arrival)
        need = -(-len(seq.token_ids) // self._pool.block_size) + self._pool.num_blocks // 8
        step.spare = 0 if seq.num_preemptions else self._pool.num_blocks - need - younger
        return None

    def _missing(self, step: Step, prompt: Prompt) -> tuple[int, int, bool]:
        """Where a prompt that has its blocks goes on, how many tokens it lacks, and if it was begun before."""
        if prompt.row >= 0:
            return int(step.starts[prompt.row]), int(step.wanted[prompt.row]), True
        start = self._running.computed_of(prompt.seq)
        return start, prompt.seq.num_tokens - start, False

    def _serve(self, step: Step, prompt: Prompt) -> bool:
        """Give a prompt what it may have, admitting it if need be. False: nothing is for those behind it."""
        seq = prompt.seq
        if seq.slot < 0:
            if not step.may_admit:
                return True
            found = self._prefixes.find(seq)
            if self._prefixes.comes(seq, len(found)):
                return True
            step.may_admit = self._admit(step, seq, found)
            if not step.may_admit:
                return True
        start, wanted, begun = self._missing(step, prompt)
        count = step.room.fit(start, wanted, begun)
        if count < (step.least(wanted) if start < seq.fill_end else 1):
            return False
        step.room.take(start, count)
        if prompt.row >= 0:
            step.counts[prompt.row] = count
        else:
            step.fresh[seq] = count
        return count == wanted

    def _admit(self, step: Step, seq: Sequence, found: list[int]) -> bool:
        """Give a waiting sequence a slot, its cached prefix and blocks for all its tokens; False, and nothing done, if
        it must wait.

        A few blocks are left over for those that run already, lest they preempt it in the next steps; and room for a
        piece of the prompts that are being computed, beside all that will decode.
        """
        known, pool = len(seq.token_ids), self._pool
        if known < seq.num_tokens or not self._running.num_free:  # preempted with a token on the device: maybe its last
            return False
        start = len(found) * pool.block_size
        least = step.least(known - start)
        if step.room.fit(start, known - start) < least:
            return False
        if self._prefixes.computing and len(self._running) + step.least(known) > step.max_tokens:
            return False
        blocks = -(-known // pool.block_size)
        need = blocks - len(found)
        reserve = min(len(self._running), pool.num_blocks // 8)
        if blocks > step.spare or need + reserve > pool.num_free - pool.unused(found):
            return False
        pool.share(found)
        fresh = pool.allocate(need)
        assert fresh is not None
        step.spare -= blocks
        self._waiting.remove(seq)
        self._running.start(seq, found, fresh)
        self._prefixes.computing.append(seq)
        return True
