"""Scheduler: choose the sequences of the next step, and record the tokens of finished steps.

This file is shared by all models and features, and names none. The code of a feature belongs elsewhere.

Invariant: the scheduler is deterministic. Every tensor-parallel rank runs its own copy on the same messages and tokens,
and all copies must plan the same steps. Nothing here reads a clock, an option, a random number or the device. State
changes only in `add`, `abort`, `extend`, `schedule`, `update` and `retract`.

There are no prefill and decode phases. Some tokens of a sequence are computed, and each step computes as many of the
others as its budget allows. Chunked prefill, decode, a prefix cache hit and resumption after a preemption are the same
case. (The idea is from vLLM v1.) The progress of running sequences is kept in arrays by slot, so a step with the same
plan as the previous one costs a few array operations instead of a loop over the sequences.
"""

from __future__ import annotations

import numpy as np

from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.budget import PrefillBudget, StepBudget
from tokenmill.engine.counts import Counts
from tokenmill.engine.limits import SchedulerLimits
from tokenmill.engine.prefill import Prefill, StepPlan
from tokenmill.engine.prefixes import PrefixCache
from tokenmill.engine.running import Running
from tokenmill.engine.sequence import Batch, Int32, Sequence, StepResult, entries_array
from tokenmill.engine.waiting import Waiting
from tokenmill.wire.messages import Extend, Output, Request, Stats


class Scheduler:
    """State of all sequences: those that wait, those that run, and the progress of each."""

    def __init__(self, pool: BlockPool, limits: SchedulerLimits) -> None:
        self.pool = pool
        self.limits, self._stride = limits, limits.stride
        self.waiting = Waiting()
        tables = limits.tables
        self.running = Running(pool, tables, limits.max_batch_size)
        self.counts = Counts()
        self._prefixes = PrefixCache(pool, tables, limits.shares_prefixes)
        self._prefill = Prefill(pool, tables, self.waiting, self.running, self._prefixes)
        self._budget = StepBudget(limits.max_batch_tokens)
        self._num_added = 0  # requests so far; gives each its `arrival`
        self._num_planned = 0  # batches so far; gives each its `number`
        self._extended: list[tuple[Sequence, int]] = []  # extended since the last batch, each from this position on
        self._notices: list[Output] = []

    @property
    def has_work(self) -> bool:
        """True if a sequence waits or runs. If False, `schedule` returns None until the next `add`."""
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a request. If it can never run, refuse it: the next `notices` contain its error."""
        refusal = self.limits.refusal(request, self.pool.num_blocks)
        if request.id in self.running or request.id in self.waiting:
            refusal = f"a request with the id {request.id} is being served"
        if refusal:
            self._notices.append(Output(request.id, finish_reason="error", message=refusal))
        else:
            self._num_added += 1
            self._prefill.queue(Sequence(request, arrival=self._num_added), self.limits)

    def abort(self, request_id: int) -> None:
        """Drop a request and free its blocks at once. It gets no further output. Unknown ids are ignored."""
        seq = self.running.get(request_id) or self.waiting.get(request_id)
        if seq is not None:
            self._finish(seq, "abort")

    def extend(self, message: Extend) -> None:
        """Append tokens without sampling them. Tokens that the device samples at their positions are discarded.

        The next `notices` contain the appended tokens. Unknown ids are ignored.
        """
        seq = self.running.get(message.id) or self.waiting.get(message.id)
        if seq is None:
            return
        assert len(seq.token_ids) == message.position
        seq.valid_from = self._num_planned + 1
        token_ids, reason = seq.append(message.token_ids)
        self.counts.forced_tokens += len(token_ids)
        num_tokens = seq.num_tokens = len(seq.token_ids)
        if seq.slot >= 0:
            self.running.tokens[seq.slot] = num_tokens
            computed = self.running.computed_of(seq)
            # the last token must run: sampling needs its logits
            self.running.computed[seq.slot] = min(computed, num_tokens - 1)
            self.running.ready_at[seq.slot] = 0
            self._extended.append((seq, message.position))
        if reason := reason or message.finish_reason:
            self._finish(seq, reason)
        if token_ids or reason:
            self._notices.append(seq.output(token_ids, message=message.message))

    def notices(self) -> list[Output]:
        """Return admissions, refusals and extensions since the last call.

        Send them before the result of `update`: a request's admission precedes its tokens.
        """
        notices, self._notices = self._notices, []
        return notices

    def schedule(self) -> Batch | None:
        """Plan the next step and count its tokens as computed. Return None if nothing can run."""
        running = self.running
        running.refresh()
        rows, slots = running.rows, running.slots
        starts = running.computed[slots]
        wanted = np.minimum(running.tokens[slots], running.max_computed[slots]) - starts
        if self._stride > 1:
            self._stagger(wanted)
        counts, prompts, budget = self._plan_decode(starts, wanted)
        preempted = running.changed
        may_admit = not preempted and running.num_free > 0 and len(self.waiting) > 0
        admitted: list[Sequence] = []
        if prompts or may_admit:
            step = StepPlan(self.limits, self._budget.max_tokens, budget, starts, wanted, counts, may_admit,
                            self.pool.num_blocks)  # fmt: skip
            self._prefill.divide(step, prompts)
            admitted = sorted(step.admitted, key=lambda seq: seq.arrival)
        if preempted or not counts.all():
            keep = np.flatnonzero(counts)
            if preempted:
                keep = np.array([row for row in keep.tolist() if rows[row].slot >= 0], np.intp)
            rows, slots, starts, counts = [rows[row] for row in keep.tolist()], slots[keep], starts[keep], counts[keep]
        if admitted:
            new = np.array([seq.slot for seq in admitted], np.int32)
            rows, slots = rows + admitted, np.concatenate((slots, new))
            starts = np.concatenate((starts, running.computed[new]))
            counts = np.concatenate((counts, np.array([step.admitted[seq] for seq in admitted], np.int32)))
            self._report_admissions(admitted)
        if not rows:
            return None
        return self._commit(rows, slots, starts, counts, admitted)

    def update(self, batch: Batch, result: StepResult) -> list[Output]:
        """Record the result of a step and return one output for each request that got something.

        Invariant: batches are passed in the order in which they were planned.
        """
        outputs: list[Output] = []
        sequences = batch.sequences
        self._prefixes.end_step()
        self._budget.record_success()
        self.counts.record(batch)
        if self._stride > 1:
            self._record_arrival(batch)
        details, payloads, number = result.details, dict(result.payloads or ()), batch.number
        for index, (row, token_id) in enumerate(zip(batch.samples.tolist(), result.token_ids, strict=True)):
            seq = sequences[row]
            if seq.finish_reason or number < seq.valid_from:  # ended or extended while the step was on the device
                continue
            if token_id < 0:
                self._fail(seq, outputs)
                continue
            token_ids = seq.token_ids
            token_ids.append(token_id)
            length = len(token_ids)
            if length >= seq.publish_at:
                self._publish(seq)
            reason = ""
            if token_id in seq.stop_ids:
                reason = "stop"
            elif length == seq.max_tokens:
                reason = "length"
            if reason:
                self._finish(seq, reason)
            if reason or details is not None or payloads:
                outputs.append(seq.output((token_id,), details[index] if details else None, payloads.pop(row, None)))
            else:
                outputs.append(Output(seq.id, (token_id,)))
        for row, payload in payloads.items():  # left over: payloads of rows that did not sample
            if not sequences[row].finish_reason:
                outputs.append(Output(sequences[row].id, payload=payload))
        return outputs

    def retract(self, batches: list[Batch]) -> None:
        """Undo the newest planned steps: `batches[0]`, which ran out of device memory, and all later ones.

        All running sequences are preempted. They keep the tokens of earlier steps. The next steps are at most half as
        large as the one that failed, until enough of them have succeeded. If the failed step had a single token, its
        request can never run, and the next `notices` contain its error.
        """
        self._prefixes.retract(len(batches))
        for seq in reversed(list(self.running.values())):
            self._preempt(seq)
        for batch in batches:
            for row in batch.samples.tolist():
                batch.sequences[row].num_tokens -= batch.number >= batch.sequences[row].valid_from
        self.counts.retracted += 1
        if batches[0].num_tokens > 1:
            self._budget.shrink(batches[0].num_tokens)
            return
        self._budget.restore()  # this request alone is too large; others may fit in full steps
        seq = batches[0].sequences[0]
        if not seq.finish_reason:
            self._finish(seq, "error")
            self._notices.append(seq.failure("the device has no memory for a single token of it"))

    def stats(self, batch: Batch | None = None, step_s: float = 0.0) -> Stats:
        """Return the current statistics. `batch`, `step_s`: the step that has just ended and its duration."""
        now = len(self.waiting), len(self.running), self.pool.num_used, self.pool.num_blocks
        return self.counts.stats(now, batch, step_s)

    # ---- planning

    def _stagger(self, wanted: Int32) -> None:
        """Set to 0 the wanted tokens of decoding rows that this step leaves to later ones.

        Those are the rows whose last token is still being computed, and all beyond an equal share: `stride` steps in
        turn decode all rows.
        """
        ready_at = self.running.ready_at[self.running.slots]
        decoding = (wanted == 1) & (ready_at > 0)
        share = -(-int(np.count_nonzero(decoding)) // self._stride)
        ready = decoding & (ready_at <= self._num_planned + 1)
        wanted[decoding & ~(ready & (ready.cumsum() <= share))] = 0

    def _record_arrival(self, batch: Batch) -> None:
        """Let any step decode the sequences of a step that has run, unless later tokens were sampled for them since."""
        ready_at, slots = self.running.ready_at, batch.slots[batch.samples]
        ready_at[slots[ready_at[slots] == batch.number + self._stride]] = batch.number

    def _plan_decode(self, starts: Int32, wanted: Int32) -> tuple[Int32, list[int], PrefillBudget]:
        """Plan one token for each decoding row, and allocate the blocks that running rows need.

        Return the number of tokens by row, the rows that are prompts, and the remaining budget.
        """
        running, prompts = self.running, np.flatnonzero(wanted > 1).tolist()
        decoding = int(np.count_nonzero(wanted == 1))
        waiting = len(self.waiting) + len(prompts)
        budget = PrefillBudget.of(self.limits, self._budget.max_tokens, decoding, waiting)
        counts, reach = wanted, starts + wanted
        if prompts or decoding > budget.tokens:
            counts = np.minimum(wanted, 1)
            counts[prompts] = 0
            counts[counts.cumsum() > budget.tokens] = 0
            reach[(counts == 0) & (wanted == 1)] = 0
        budget.tokens -= int(counts.sum())
        rows = running.rows
        short = np.flatnonzero(reach > running.covered[running.slots]).tolist()
        for row in sorted(short, key=lambda row: rows[row].arrival):
            if rows[row].slot >= 0:  # the oldest first, so no blocks go to a row that is preempted here
                self._grow(rows[row], int(reach[row]))
        return counts, prompts, budget

    def _grow(self, seq: Sequence, num_tokens: int) -> None:
        """Allocate the blocks of `num_tokens` tokens for `seq`.

        While too few are free, preempt the youngest sequence: maybe `seq`.
        """
        while not self.running.grow(seq, num_tokens):
            victim = max(self.running.values(), key=lambda other: other.arrival)
            self._preempt(victim)
            if victim is seq:
                return

    def _report_admissions(self, admitted: list[Sequence]) -> None:
        """Add a notice for each sequence that is admitted for the first time."""
        for seq in admitted:
            if not seq.was_admitted:
                seq.was_admitted = True
                num_cached = seq.num_published * self.pool.block_size
                self.counts.cached_tokens += num_cached
                self._notices.append(Output(seq.id, num_cached=num_cached))

    def _commit(
        self, rows: list[Sequence], slots: Int32, starts: Int32, counts: Int32, admitted: list[Sequence]
    ) -> Batch:
        """Count the step's tokens as computed, and return the batch."""
        self._prefixes.begin_step()
        computed = starts + counts
        self.running.computed[slots] = computed
        sampling = computed == self.running.tokens[slots]
        self.running.tokens[slots] += sampling
        long = counts > 1
        num_tokens = int(counts.sum())
        num_prefill_rows = int(np.count_nonzero(long | ~sampling))
        if num_prefill_rows:
            for row in np.flatnonzero(long).tolist():
                # Before the step has run: steps run in order, so a later step that shares these blocks reads them
                # after they are written.
                self._publish(rows[row])
        entries = self.running.entries()
        samples = np.flatnonzero(sampling).astype(np.int32)
        self._num_planned += 1
        if self._stride > 1:
            self.running.ready_at[slots[samples]] = self._num_planned + self._stride
        return Batch(
            slots, starts, counts, samples, rows, admitted, entries, num_tokens, num_prefill_rows, self._num_planned,
            self._host_tokens(),
        )  # fmt: skip

    def _host_tokens(self) -> Int32:
        """Return (n, 3) slot, position, id: tokens of running sequences that `extend` appended since the last batch."""
        extended, self._extended = self._extended, []
        return entries_array([entry for seq, start in extended if seq.slot >= 0 for entry in seq.entries(start)])

    # ---- one sequence

    def _preempt(self, seq: Sequence) -> None:
        """Return `seq` to its place in the queue and release its blocks. They stay cached until they are reused."""
        seq.num_tokens = int(self.running.tokens[seq.slot])
        seq.num_preemptions += 1
        self.counts.preemptions += 1
        self.running.release(seq)
        self._prefill.queue(seq, self.limits)

    def _publish(self, seq: Sequence) -> None:
        """Publish the full blocks of `seq` whose tokens are all known and computed."""
        if seq.slot >= 0:
            self._prefixes.publish(seq, self.running.computed_of(seq))

    def _fail(self, seq: Sequence, outputs: list[Output]) -> None:
        """End a sequence whose logits are not finite, and remove its blocks from the prefix cache."""
        self._prefixes.unpublish(seq)
        self._finish(seq, "error")
        outputs.append(seq.failure("the model's output is not a finite number"))

    def _finish(self, seq: Sequence, reason: str) -> None:
        seq.finish_reason = reason
        if seq.slot >= 0:
            self.running.release(seq)
        else:
            self.waiting.remove(seq)
