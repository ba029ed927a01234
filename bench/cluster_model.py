"""A simulated replica: the engine's prefill budget and order of prompts, a step-time model, and a prefix cache.

Simplified against the engine: a sequence reserves cache for its whole answer when it joins, so nothing is preempted.
The prefix cache holds whole conversations and system prompts, and gives up the one that was not used for longest. Steps
in which nothing changes but the length of the contexts are one event.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Any, NamedTuple

from tokenmill.engine.budget import PrefillBudget
from tokenmill.engine.limits import SchedulerLimits

_BLOCK = 16


class StepTime(NamedTuple):
    """Seconds of a step: `fixed` + `token` · prompt tokens + `row` · decoding rows + `context` · cache entries read."""

    fixed: float
    token: float
    row: float
    context: float

    def step(self, prompt_tokens: int, rows: int, context: int) -> float:
        """Return the seconds of one step."""
        return self.fixed + self.token * prompt_tokens + self.row * rows + self.context * context

    def run(self, steps: int, rows: int, context: int) -> float:
        """Return the seconds of `steps` steps in which `rows` sequences decode, from a total `context` on."""
        grown = self.context * rows * steps * (steps - 1) / 2
        return steps * (self.fixed + self.row * rows + self.context * context) + grown


@dataclass(frozen=True, slots=True)
class Machine:
    """A kind of replica. `capacity`: tokens of its cache; `overhead_s`: of a request outside of the engine."""

    time: StepTime
    limits: SchedulerLimits
    capacity: int
    overhead_s: float = 0.002


class Stream:
    """One request. `shared`: tokens of its system prompt; `moved_at`: when its replica was lost, 0.0: never; `done`:
    computed or cached tokens of the prompt; `need`: reserved tokens of the cache, 0: it waits."""

    __slots__ = (
        "arrived", "conversation", "done", "eligible", "first", "last_step", "moved_at", "need", "new_tokens",
        "num_generated", "order", "prompt_tokens", "replica", "router", "shared", "system", "ticket",
    )  # fmt: skip

    def __init__(
        self, arrived: float, conversation: int, system: int, shared: int, prompt_tokens: int, new_tokens: int
    ) -> None:
        self.arrived, self.conversation, self.system, self.shared = arrived, conversation, system, shared
        self.prompt_tokens, self.new_tokens = prompt_tokens, new_tokens
        self.num_generated = self.done = self.need = self.eligible = self.last_step = self.order = 0
        self.first = self.moved_at = 0.0
        self.replica, self.router = -1, 0
        self.ticket: Any = None


@dataclass(slots=True)
class Ended:
    """Events of one segment: streams that got their first token (since a move), and streams that ended."""

    started: list[Stream] = field(default_factory=list)
    finished: list[Stream] = field(default_factory=list)


class Replica:
    """One engine. `submit` requests, call `advance` at `until`; both return the time of the next call, or None."""

    def __init__(self, index: int, machine: Machine) -> None:
        self.index, self.machine = index, machine
        self.until: float | None = None
        self.version = 0  # changes with `until`
        self.num_steps = self.num_hits = self.num_prompt = 0  # steps; prompt tokens found in the cache, and all
        self.busy_s = 0.0
        self.rows: list[tuple[int, int, Stream]] = []  # heap by the step of the last token
        self.queue: deque[Stream] = deque()
        self.prompts: list[Stream] = []  # those that are being computed
        self.context = self.reserved = 0
        self._begun, self._steps = 0.0, 0  # of the segment: its start; steps, 0: a step with prompts
        self._chunks: list[tuple[Stream, int]] = []
        self._order = count()
        self._cache: OrderedDict[int, int] = OrderedDict()  # conversation, or -1 - system prompt -> tokens
        self._cached = 0

    @property
    def streams(self) -> list[Stream]:
        """All unfinished streams."""
        return [stream for _, _, stream in self.rows] + self.prompts + list(self.queue)

    def submit(self, stream: Stream, now: float) -> float | None:
        """Queue a request. Return the new end of the segment, if it changes."""
        stream.replica = self.index
        stream.order = next(self._order)
        self.queue.append(stream)
        if self.until is None:
            stream.eligible = self.num_steps
            return self._plan(now)
        stream.eligible = self.num_steps + 2  # the step behind the present one is planned already
        if self._steps:
            return self._cut(now)
        return None

    @property
    def num_requests(self) -> int:
        """Number of unfinished streams."""
        return len(self.rows) + len(self.prompts) + len(self.queue)

    def generated(self, stream: Stream) -> int:
        """Return the number of tokens of a stream that decodes, as of the last segment."""
        return stream.new_tokens - (stream.last_step - self.num_steps)

    def advance(self) -> Ended:
        """Apply the segment that ends now, and begin the next one."""
        assert self.until is not None
        now, ended = self.until, Ended()
        steps, rows = self._steps or 1, len(self.rows)
        self.busy_s += now - self._begun
        self.num_steps += steps
        self.context += steps * rows
        for stream, num in self._chunks:
            stream.done += num
            if stream.done == stream.prompt_tokens:
                self._start(stream, now, ended)
        self._chunks = []
        while self.rows and self.rows[0][0] <= self.num_steps:
            stream = heappop(self.rows)[2]
            self.context -= stream.prompt_tokens + stream.new_tokens
            self._leave(stream)
            ended.finished.append(stream)
        self.until = None
        self._plan(now)
        return ended

    def _start(self, stream: Stream, now: float, ended: Ended) -> None:
        self.prompts.remove(stream)
        stream.first = stream.first or now
        stream.last_step = self.num_steps + stream.new_tokens - 1
        self.context += stream.prompt_tokens + 1
        heappush(self.rows, (stream.last_step, next(self._order), stream))
        ended.started.append(stream)

    def _plan(self, now: float) -> float | None:
        """Begin a segment at `now`."""
        time, rows = self.machine.time, len(self.rows)
        self._chunks = self._divide() if self.prompts or self.queue else []
        if self._chunks:
            self._steps = 0
            length = time.step(sum(num for _, num in self._chunks), rows, self.context)
        elif rows:
            self._steps = max(1, self.rows[0][0] - self.num_steps)
            if self.queue and self.queue[-1].eligible > self.num_steps:
                eligible = next(one.eligible for one in self.queue if one.eligible > self.num_steps)
                self._steps = min(self._steps, eligible - self.num_steps)
            length = time.run(self._steps, rows, self.context)
        else:
            return None
        self._begun, self.until = now, now + length
        self.version += 1
        return self.until

    def _cut(self, now: float) -> float:
        """End the present run of decoding steps with the step that is being computed at `now`."""
        time, rows, most = self.machine.time, len(self.rows), self._steps
        low, high = 1, most
        while low < high:
            middle = (low + high) // 2
            if self._begun + time.run(middle, rows, self.context) >= now:
                high = middle
            else:
                low = middle + 1
        self._steps = low
        self.until = self._begun + time.run(low, rows, self.context)
        self.queue[-1].eligible = self.num_steps + low + 1
        self.version += 1
        return self.until

    def _divide(self) -> list[tuple[Stream, int]]:
        """Divide a step among prompts as the engine does: the shortest first, but the oldest gets half at least."""
        limits, rows = self.machine.limits, len(self.rows)
        budget = PrefillBudget.of(limits, limits.max_batch_tokens, rows, len(self.queue) + len(self.prompts))
        budget.tokens -= rows
        idle = not self.rows and not self.prompts  # then no further step is planned
        waiting = [stream for stream in self.queue if idle or stream.eligible <= self.num_steps]
        everyone = self.prompts + waiting
        chunks: list[tuple[Stream, int]] = []
        if not everyone:
            return chunks
        for stream in waiting:
            stream.done = self._hit(stream)
        oldest = reserved = min(everyone, key=lambda stream: stream.order)
        budget.reserve(oldest.done, oldest.prompt_tokens - oldest.done, oldest.need > 0)
        everyone.sort(key=lambda one: (limits.size_class(one.done, one.prompt_tokens - one.done), one.order))
        for stream in everyone:
            if stream is reserved:
                budget.release()
                reserved = None
            if not self._plan_chunk(stream, budget, chunks):
                break
        if reserved is not None:
            budget.release()
            self._plan_chunk(reserved, budget, chunks)
        return chunks

    def _plan_chunk(self, stream: Stream, budget: PrefillBudget, chunks: list[tuple[Stream, int]]) -> bool:
        """Plan a chunk of a prompt, which joins if it waits. Return False if no later prompt may be computed."""
        machine, left = self.machine, stream.prompt_tokens - stream.done
        num = budget.fit(stream.done, left, stream.need > 0)
        if num < min(left, machine.limits.min_chunk):
            return False
        if not stream.need:
            need, others = stream.prompt_tokens + stream.new_tokens, len(self.rows) + len(self.prompts)
            if others and (others >= machine.limits.max_batch_size or self.reserved + need > machine.capacity):
                return True
            self._join(stream, need)
        budget.take(stream.done, num)
        chunks.append((stream, num))
        return num == left

    def _join(self, stream: Stream, need: int) -> None:
        self.queue.remove(stream)
        self.prompts.append(stream)
        stream.need = need
        self.num_hits += stream.done
        self.num_prompt += stream.prompt_tokens
        self.reserved += need
        for key in (-1 - stream.system, stream.conversation):
            if key in self._cache:
                self._cache.move_to_end(key)
        self._evict()

    # The prefix cache

    def _hit(self, stream: Stream) -> int:
        """Return the cached prefix of a prompt in whole blocks. One token at least is computed."""
        known = max(self._cache.get(stream.conversation, 0), self._cache.get(-1 - stream.system, 0))
        return min(known, stream.prompt_tokens - 1) // _BLOCK * _BLOCK

    def _leave(self, stream: Stream) -> None:
        """Give back the reserved tokens of a stream; its blocks stay cached."""
        length = stream.prompt_tokens + stream.new_tokens
        self.reserved -= stream.need
        for key, size in ((-1 - stream.system, stream.shared), (stream.conversation, length)):
            self._cached += size - self._cache.pop(key, 0)
            self._cache[key] = size
        self._evict()

    def _evict(self) -> None:
        while self._cache and self._cached + self.reserved > self.machine.capacity:
            self._cached -= self._cache.popitem(last=False)[1]
