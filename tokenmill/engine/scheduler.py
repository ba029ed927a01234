"""Who runs in the next step. Shared by every model and feature: features go elsewhere, none is named here.

Pure: its state changes only by `add`, `abort`, `extend`, `schedule`, `update` and `retract`. Every tensor-parallel
rank runs its own copy on the same messages and tokens and must reach the same plan, so nothing here reads a clock, an
option, a random number or the device.

There are no prefill and decode phases. A sequence has tokens of which some are computed; each step gives it as many
as the budget allows. Chunked prefill, decode, a prefix-cache hit and the resumption after a preemption are the same
case. (The idea is vLLM v1's.) What a step needs of every running sequence stands in arrays by slot, so that a step
whose plan is the last one's costs a few array operations, not a walk over the sequences.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from itertools import takewhile

import numpy as np

from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.budget import Room, StepBudget
from tokenmill.engine.counts import Counts
from tokenmill.engine.limits import SchedulerLimits
from tokenmill.engine.sequence import Batch, Int32, Sequence, StepResult
from tokenmill.wire.messages import Extend, Output, Request, Stats, TokenDetails

_NO_ENTRIES = np.zeros((0, 3), np.int32)


class Scheduler:
    """Sequences that wait, in order; sequences that run, in order of admission; and how far each is."""

    def __init__(self, pool: BlockPool, limits: SchedulerLimits) -> None:
        self.pool = pool
        self.limits = limits
        self.waiting: OrderedDict[int, Sequence] = OrderedDict()
        self.running: dict[int, Sequence] = {}  # the last is preempted first
        self.counts = Counts()
        size = limits.max_batch_size
        self._free_slots = list(range(size - 1, -1, -1))
        self._tokens = np.zeros(size, np.int32)  # by slot: tokens known here or on the device
        self._computed = np.zeros(size, np.int32)  # by slot: tokens whose cache entries a launched step has written
        self._last = np.zeros(size, np.int32)  # by slot: tokens ever to compute; the last one is only sampled
        self._held = np.zeros(size, np.int32)  # by slot: blocks
        # `running` as a list and its slots: made anew when it changed, never written to, for batches hold them
        self._rows: list[Sequence] = []
        self._slots: Int32 = np.zeros(0, np.int32)
        self._changed = False
        self._budget = StepBudget(limits.max_batch_tokens)
        self._room = Room.of(limits, limits.max_batch_tokens, 0, 0)  # of the step being planned
        self._entries: list[tuple[int, int, int]] = []  # of block tables, new in this step
        self._num_planned = 0  # batches
        self._extended: list[tuple[Sequence, int]] = []  # new since the last batch: from which position on
        self._notices: list[Output] = []
        self._coming: set[bytes] = set()  # hashes of blocks that the step being planned computes
        self._offered: deque[list[int]] = deque()  # by step on the device: blocks published before it has filled them

    @property
    def has_work(self) -> bool:
        """False if `schedule` has nothing to plan until the next `add`."""
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a request. One that can never run is refused: its end is among the next notices."""
        refusal = self.limits.refusal(request, self.pool.num_blocks)
        if request.id in self.running or request.id in self.waiting:
            refusal = f"a request with the id {request.id} is being served"
        if refusal:
            self._notices.append(Output(request.id, finish_reason="error", message=refusal))
        else:
            self.waiting[request.id] = Sequence(request)

    def abort(self, request_id: int) -> None:
        """Forget a request and free its blocks at once; nothing comes of it any more. Unknown ids are ignored."""
        seq = self.running.get(request_id) or self.waiting.get(request_id)
        if seq is not None:
            self._finish(seq, "abort")

    def extend(self, message: Extend) -> None:
        """Append tokens that nobody sampled; of what the device has sampled in their place nothing comes.

        What came of it is among the next notices.
        """
        seq = self.running.get(message.id) or self.waiting.get(message.id)
        if seq is None:
            return
        assert len(seq.token_ids) == message.position
        seq.valid_from = self._num_planned + 1
        token_ids, reason = seq.append(message.token_ids)
        self.counts.forced_tokens += len(token_ids)
        known = seq.num_tokens = len(seq.token_ids)
        if seq.slot >= 0:
            self._tokens[seq.slot] = known
            self._computed[seq.slot] = min(int(self._computed[seq.slot]), known - 1)  # one must run, to sample
            self._extended.append((seq, message.position))
        if reason := reason or message.finish_reason:
            self._finish(seq, reason)
        if token_ids or reason:
            self._notices.append(seq.output(token_ids, message=message.message))

    def notices(self) -> list[Output]:
        """Admissions and refusals since the last call. They precede what `update` says of the same requests."""
        notices, self._notices = self._notices, []
        return notices

    def schedule(self) -> Batch | None:
        """Plan the next step and count it as done; None when nothing can run."""
        self._entries = []
        rows, slots, starts, counts, preempted = self._go_on()
        admitted: list[Sequence] = []
        if self.waiting and not preempted:
            self._expect(rows, starts, counts)
            admitted, fresh_counts = self._admit(self._room)
            if admitted:
                fresh = np.array([seq.slot for seq in admitted], np.int32)
                rows, slots = rows + admitted, np.concatenate((slots, fresh))
                starts = np.concatenate((starts, self._computed[fresh]))
                counts = np.concatenate((counts, np.array(fresh_counts, np.int32)))
        if not rows:
            return None
        return self._commit(rows, slots, starts, counts, admitted)

    def update(self, batch: Batch, result: StepResult) -> list[Output]:
        """Record what a step gave and say what came of it. Batches come back in the order they were planned."""
        outputs: list[Output] = []
        sequences = batch.sequences
        self._offered.popleft()  # what it computed is there
        self._budget.passed()
        self.counts.passed(batch)
        details, prompts, number = result.details, self._prompt_details(batch, result), batch.number
        for index, (row, token_id) in enumerate(zip(batch.samples.tolist(), result.token_ids, strict=True)):
            seq = sequences[row]
            if seq.finish_reason or number < seq.valid_from:  # ended, or overtaken, while the step was on the device
                continue
            if token_id < 0:
                self._fail(seq, outputs)
                continue
            token_ids = seq.token_ids
            token_ids.append(token_id)
            if len(token_ids) >= seq.publish_at:
                self._publish(seq)
            reason = ""
            if token_id in seq.stop_ids:
                reason = "stop"
            elif len(token_ids) == seq.max_tokens:
                reason = "length"
            if reason:
                self._finish(seq, reason)
            if reason or details is not None or prompts:
                outputs.append(seq.output((token_id,), details[index] if details else None, prompts.pop(row, ())))
            else:
                outputs.append(Output(seq.id, (token_id,)))
        for row, found in prompts.items():  # of rows that did not sample
            if not sequences[row].finish_reason:
                outputs.append(Output(sequences[row].id, prompt_details=found))
        return outputs

    def retract(self, batches: list[Batch]) -> None:
        """Take back the newest planned steps, all from the first that found no memory on: nothing of them counts.

        Everybody waits again, in order, as after a preemption, and keeps the tokens of earlier steps. The next steps
        are half as large as the one that failed, until many went well. If that was of a single token, its request can
        never run: its end is among the next notices.
        """
        for _ in batches:
            self.pool.unpublish(self._offered.pop())
        for seq in reversed(list(self.running.values())):
            self._preempt(seq)
        for batch in batches:
            for row in batch.samples.tolist():
                batch.sequences[row].num_tokens -= batch.number >= batch.sequences[row].valid_from
        self.counts.retracted += 1
        if batches[0].num_tokens > 1:
            self._budget.shrink(batches[0].num_tokens)
            return
        self._budget.restore()  # a request's own need says nothing of the others'
        seq = batches[0].sequences[0]
        if not seq.finish_reason:
            self._finish(seq, "error")
            self._notices.append(seq.failure("the device has no memory for a single token of it"))

    def stats(self, batch: Batch | None = None, step_s: float = 0.0) -> Stats:
        """The books as they stand; `batch` and `step_s` are the step they are told after."""
        now = len(self.waiting), len(self.running), self.pool.num_used, self.pool.num_blocks
        return self.counts.stats(now, batch, step_s)

    # ---- planning

    def _go_on(self) -> tuple[list[Sequence], Int32, Int32, Int32, bool]:
        """The running sequences' part of the step: rows, slots, starts, counts; and whether one was preempted."""
        if self._changed:
            self._rows = list(self.running.values())
            self._slots = np.array([seq.slot for seq in self._rows], np.int32)
            self._changed = False
        rows, slots = self._rows, self._slots
        starts = self._computed[slots]
        counts = np.minimum(self._tokens[slots], self._last[slots]) - starts
        counts = self._within_budget(starts, counts)
        need = -(-(starts + counts) // self.pool.block_size) - self._held[slots]
        for row in np.flatnonzero(need > 0).tolist():
            if rows[row].slot >= 0 and not self._grow(rows[row], int(need[row])):
                break  # it was the youngest
        if not self._changed and counts.all():
            return rows, slots, starts, counts, False
        keep = np.array([row for row, count in enumerate(counts.tolist()) if count and rows[row].slot >= 0], np.intp)
        return [rows[row] for row in keep.tolist()], slots[keep], starts[keep], counts[keep], self._changed

    def _within_budget(self, starts: Int32, wanted: Int32) -> Int32:
        """How many of the wanted tokens each row gets: those that want one, then those in the middle of their prompt.

        That is the youngest, if any, and those before it take a token each, as they did when it was admitted: what is
        left for it does not shrink, so `min_chunk` needs no look here.
        """
        decoding, long = int(np.count_nonzero(wanted == 1)), np.flatnonzero(wanted > 1).tolist()
        waiting = len(self.waiting) + len(long)
        self._room = room = Room.of(self.limits, self._budget.max_tokens, decoding, waiting)
        if not long and decoding <= room.tokens:
            room.tokens -= decoding
            return wanted
        given: Int32 = np.minimum(wanted, 1)
        given[given.cumsum() > room.tokens] = 0
        given[long] = 0
        room.tokens -= int(given.sum())
        for row in long:
            start, count = int(starts[row]), int(wanted[row])
            given[row] = fits = room.fit(start, count)
            room.take(start, fits, count)
        return given

    def _expect(self, rows: list[Sequence], starts: Int32, counts: Int32) -> None:
        """Note which blocks these rows compute: who needs one of them next shares it a step later instead."""
        size = self.pool.block_size
        self._coming.clear()
        for row in np.flatnonzero(counts > 1).tolist():
            self._coming.update(rows[row].hashes_of(starts[row] // size, (starts[row] + counts[row]) // size, size))

    def _admit(self, room: Room) -> tuple[list[Sequence], list[int]]:
        """Let waiting sequences run, in order, while there are slots, blocks and room; who, and their counts."""
        admitted: list[Sequence] = []
        counts: list[int] = []
        while self.waiting and self._free_slots and room.tokens:
            seq = next(iter(self.waiting.values()))
            count = self._try_to_admit(seq, room)
            if not count:
                break
            admitted.append(seq)
            counts.append(count)
        return admitted, counts

    def _try_to_admit(self, seq: Sequence, room: Room) -> int:
        """Give the head of the queue a slot, its cached prefix and blocks for all its tokens; how many it may compute
        now.

        0, and nothing done, if it must wait. A few blocks are left over for those that run already, lest they preempt
        it in the next steps.
        """
        known = len(seq.token_ids)
        if known < seq.num_tokens:  # preempted with a token on the device, which may be its last
            return 0
        pool, size = self.pool, self.pool.block_size
        # at least one token must run, or there is nothing to sample from
        sharable = 0 if seq.request.computes_whole_prompt else (known - 1) // size
        cached = pool.match(seq.hashes_of(0, sharable, size))
        coming = sum(1 for _ in takewhile(self._coming.__contains__, seq.hashes_of(len(cached), sharable, size)))
        left = known - len(cached) * size
        if 2 * coming * size >= left:  # another computes most of it in this very step
            return 0
        start = len(cached) * size
        count = room.fit(start, left)
        if count < max(1, min(left, self.limits.min_chunk, self._budget.max_tokens)):
            return 0
        need = -(-known // size) - len(cached)
        reserve = min(len(self.running), pool.num_blocks // 8)
        if need + reserve > pool.num_free - pool.unused(cached):
            return 0
        pool.share(cached)
        fresh = pool.allocate(need)
        assert fresh is not None
        self._start(seq, cached, fresh)
        room.take(start, count, left)
        self._coming.update(seq.hashes_of(len(cached), len(cached) + count // size, size))
        return count

    def _start(self, seq: Sequence, cached: list[int], fresh: list[int]) -> None:
        """Move `seq` from `waiting` to `running`."""
        slot = self._free_slots.pop()
        del self.waiting[seq.id]
        self.running[seq.id] = seq
        self._changed = True
        num_cached = len(cached) * self.pool.block_size
        seq.slot, seq.blocks = slot, cached + fresh
        seq.num_published = len(cached)
        seq.publish_at = num_cached + self.pool.block_size
        self._tokens[slot] = seq.num_tokens
        self._computed[slot] = num_cached
        self._last[slot] = seq.max_tokens - 1
        self._held[slot] = len(seq.blocks)
        self._entries += [(slot, index, block) for index, block in enumerate(seq.blocks)]
        if not seq.was_admitted:
            seq.was_admitted = True
            self.counts.cached_tokens += num_cached
            self._notices.append(Output(seq.id, num_cached=num_cached))

    def _grow(self, seq: Sequence, need: int) -> bool:
        """Give `seq` that many more blocks, preempting the youngest for them; False if that was itself."""
        while (fresh := self.pool.allocate(need)) is None:
            victim = next(reversed(self.running.values()))
            self._preempt(victim)
            if victim is seq:
                return False
        held = len(seq.blocks)
        self._entries += [(seq.slot, held + index, block) for index, block in enumerate(fresh)]
        seq.blocks += fresh
        self._held[seq.slot] = held + need
        return True

    def _commit(
        self, rows: list[Sequence], slots: Int32, starts: Int32, counts: Int32, admitted: list[Sequence]
    ) -> Batch:
        """Count the step's tokens as computed."""
        self._offered.append([])
        computed = starts + counts
        self._computed[slots] = computed
        sampling = computed == self._tokens[slots]
        self._tokens[slots] += sampling
        long = counts > 1
        num_tokens = int(counts.sum())
        num_prefill_rows = int(np.count_nonzero(long | ~sampling))
        if num_prefill_rows:
            for row in np.flatnonzero(long).tolist():
                # before it has run, for steps run in order: who finds these blocks reads them after the write
                self._publish(rows[row])
        entries = np.array(self._entries, np.int32) if self._entries else _NO_ENTRIES
        samples = np.flatnonzero(sampling).astype(np.int32)
        self._num_planned += 1
        return Batch(
            slots, starts, counts, samples, rows, admitted, entries, num_tokens, num_prefill_rows, self._num_planned,
            self._host_tokens(),
        )  # fmt: skip

    def _host_tokens(self) -> Int32:
        """The tokens that `extend` brought since the last batch, of those who still run."""
        extended, self._extended = self._extended, []
        entries = [entry for seq, start in extended if seq.slot >= 0 for entry in seq.entries(start)]
        return np.array(entries, np.int32) if entries else _NO_ENTRIES

    # ---- one sequence

    def _preempt(self, seq: Sequence) -> None:
        """Back to the head of the queue as if new. Its blocks stay cached while nobody needs them."""
        seq.num_tokens = int(self._tokens[seq.slot])
        seq.num_preemptions += 1
        self.counts.preemptions += 1
        self._release(seq)
        self.waiting[seq.id] = seq
        self.waiting.move_to_end(seq.id, last=False)

    def _release(self, seq: Sequence) -> None:
        # A launched step may still write to these blocks and this slot. They can be handed on all the same: steps
        # run in order, so that write lands before any later step's.
        del self.running[seq.id]
        self._changed = True
        self._free_slots.append(seq.slot)
        self.pool.release(seq.blocks)
        seq.slot, seq.blocks = -1, []

    def _publish(self, seq: Sequence) -> None:
        """Offer the blocks whose tokens are all known and computed."""
        if seq.slot < 0:
            return
        size = self.pool.block_size
        full = min(len(seq.token_ids), int(self._computed[seq.slot])) // size
        seq.hash_blocks(full, size)
        for index in range(seq.num_published, full):
            self.pool.publish(seq.blocks[index], seq.hashes[index])
        if self._offered:
            self._offered[-1] += seq.blocks[seq.num_published : full]
        seq.num_published = max(full, seq.num_published)
        seq.publish_at = (seq.num_published + 1) * size

    def _fail(self, seq: Sequence, outputs: list[Output]) -> None:
        """End a sequence whose numbers are worthless, and let nobody find what it computed."""
        self.pool.unpublish(seq.blocks)
        self._finish(seq, "error")
        outputs.append(seq.failure("the model's output is not a finite number"))

    def _finish(self, seq: Sequence, reason: str) -> None:
        seq.finish_reason = reason
        if seq.slot >= 0:
            self._release(seq)
        else:
            del self.waiting[seq.id]

    def _prompt_details(self, batch: Batch, result: StepResult) -> dict[int, tuple[TokenDetails, ...]]:
        """By row, if there are any that were not handed out before."""
        found = result.prompt_details or {}
        fresh = {row: batch.sequences[row].fresh(int(batch.starts[row]), details) for row, details in found.items()}
        return {row: details for row, details in fresh.items() if details}
