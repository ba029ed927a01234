"""Small random grammars, a reference for constrained requests, and an engine over the oracle with constraints."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import numpy as np
from oracle import EOS, POISON, VOCAB, ListLink, OracleStep, PagedOracle, cache_entry, check_books, next_token, number

from tokenmill.backends.base import Masks, StepResult
from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.engine import Engine, Link
from tokenmill.engine.extended import Extended
from tokenmill.engine.gated import Gated
from tokenmill.engine.limits import SchedulerLimits
from tokenmill.engine.scheduler import Scheduler
from tokenmill.engine.sequence import Batch
from tokenmill.engine.timed import Timed
from tokenmill.errors import GrammarError
from tokenmill.runtime.constraints import Constraints
from tokenmill.wire.messages import GrammarSpec, Output, Request, Stats, ToEngine, ToScheduler

ENDS = (EOS, 1)  # ids that end a text
WORDS = -(-VOCAB // 32)


class Automaton:
    """A random automaton: states have few transitions, often a single one. Some are final, some are dead ends."""

    nbytes = 100

    def __init__(self, seed: int, dead: float = 0.03) -> None:
        rng = random.Random(seed)
        size = rng.randint(2, 30)
        self.edges: list[dict[int, int]] = []
        for state in range(size - 1):
            ways = rng.choice([1, 1, 1, 2, 5, 30]) if rng.random() >= dead else 0
            tokens = rng.sample(range(2, VOCAB), ways)
            self.edges.append({t: min(size - 1, state + rng.choice([1, 1, 1, 2, 0])) for t in tokens})
        self.edges.append({})
        self.ends = {state for state in range(size) if rng.random() < 0.2} | {size - 1}

    def matcher(self) -> AutomatonMatcher:
        return AutomatonMatcher(self)


class AutomatonMatcher:
    """Implementation of `grammar.base.Matcher` over an automaton."""

    failure = ""

    def __init__(self, grammar: Automaton) -> None:
        self.grammar, self.states = grammar, [0]

    @property
    def ways(self) -> dict[int, int]:
        return self.grammar.edges[self.states[-1]]

    @property
    def may_end(self) -> bool:
        return self.states[-1] in self.grammar.ends

    @property
    def done(self) -> bool:
        return not self.ways and self.may_end

    def fill_mask(self, mask: Any, row: int) -> None:
        mask[row] = 0
        for token_id in (*self.ways, *(ENDS if self.may_end else ())):
            mask[row, token_id // 32] |= np.uint32(1 << token_id % 32)

    def accept(self, token_id: int) -> bool:
        if token_id not in self.ways:
            return False
        self.states.append(self.ways[token_id])
        return True

    def rollback(self, n: int) -> None:
        del self.states[len(self.states) - n :]

    def forced(self, most: int) -> list[int]:
        found: list[int] = []
        state = self.states[-1]
        while len(found) < most and len(self.grammar.edges[state]) == 1 and state not in self.grammar.ends:
            ((token_id, state),) = self.grammar.edges[state].items()
            found.append(token_id)
        return found


class Thought:
    """Reference for the reasoning budget, one token at a time."""

    def __init__(self, request: Request) -> None:
        self.stopping, self.open, self.queue = request.stopping, request.stopping.force_after > 0, list[int]()

    def after(self, out: list[int]) -> None:
        if self.open and ends_with(out, self.stopping.unless):
            self.open = False
        if self.open and len(out) >= self.stopping.force_after:
            self.open, self.queue = False, list(self.stopping.forced_ids)


def ends_with(out: list[int], endings: tuple[tuple[int, ...], ...]) -> bool:
    return any(tuple(out[-len(ids) :]) == ids for ids in endings)


def guided_reference(request: Request) -> tuple[list[int], str]:
    """Return tokens and finish reason of a request: one sequence, one token at a time, no paging, no overlap."""
    entries: list[int] = []
    for token_id in request.prompt_ids:
        entries.append(cache_entry(token_id, entries, request.salt))
    out: list[int] = []
    stopping, spec, thought = request.stopping, request.grammar, Thought(request)
    matcher = Automaton(int(spec.source)).matcher() if spec else None
    begun = spec is not None and not spec.after
    while True:
        allowed = list(range(VOCAB))
        if begun and not thought.queue:
            assert matcher is not None
            early = len(out) < stopping.min_new_tokens
            ends = [] if early or not matcher.may_end else [i for i in ENDS if i in stopping.stop_ids]
            allowed = sorted({*matcher.ways, *ends} - (set(stopping.stop_ids) if early else set()))
            if not allowed:
                return out, "stop" if matcher.may_end else "error"
        token_id = thought.queue.pop(0) if thought.queue else pick(entries, allowed)
        out.append(token_id)
        entries.append(cache_entry(token_id, entries, request.salt))
        if token_id in stopping.stop_ids:
            return out, "stop"
        if len(out) == stopping.max_new_tokens:
            return out, "length"
        if begun:
            assert matcher is not None
            assert matcher.accept(token_id)
            if matcher.done and not (set(ENDS) & set(stopping.stop_ids)):
                return out, "stop"
        elif spec and ends_with(out, spec.after):
            begun = True
        thought.after(out)
        if begun and thought.queue:  # tokens that the grammar refuses are not forced
            assert matcher is not None
            taken = sum(1 for _ in itertools.takewhile(matcher.accept, thought.queue))
            matcher.rollback(taken)
            thought.queue = thought.queue if taken == len(thought.queue) else []


def pick(entries: list[int], allowed: list[int]) -> int:
    return -1 if POISON in entries else allowed[number(entries) % len(allowed)]


class Guided(PagedOracle):
    """The oracle as an executor with constraints. A deferred step samples from masks, unless it was given up."""

    def __init__(self, num_blocks: int, limits: SchedulerLimits, constraints: Constraints) -> None:
        super().__init__(num_blocks, limits)
        self.constraints = constraints
        self.deferred: dict[int, bool] = {}
        self.masks: dict[int, Masks] = {}
        self.chosen: dict[tuple[int, int], int] = {}
        self.num_masks = self.num_launched = self.num_collected = 0
        self.fails: tuple[str, int] = "", 0  # the launch or collect that runs out of memory

    def launch(self, batch: Batch) -> OracleStep:
        deferred = self.constraints.defers(batch)
        self.num_launched += 1
        with self.failing("launch", self.num_launched):
            step = super().launch(batch)
        self.deferred[batch.number] = deferred
        return step

    def complete(self, step: OracleStep) -> None:
        super().complete(step)
        if self.deferred[step.batch.number]:
            masks = self.constraints.masks(step.batch)
            assert masks.bits.any(1).all(), "no row without a choice"
            assert (np.diff(masks.rows) > 0).all()
            self.masks[step.batch.number] = masks
            self.num_masks += len(masks.rows)

    def collect(self, step: OracleStep) -> StepResult:
        self.num_collected += 1
        with self.failing("collect", self.num_collected):
            result = super().collect(step)
        self.constraints.observe(step.batch, result.token_ids)
        return result

    @contextmanager
    def failing(self, what: str, count: int) -> Iterator[None]:
        rate = self.full_rate
        if (what, count) == self.fails:
            self.full_rate = 1.0
        try:
            yield
        finally:
            self.full_rate = rate

    def choose(self, step: OracleStep, row: int, entries: list[int]) -> int:
        number = step.batch.number
        place = step.batch.samples.tolist().index(row)
        masks = self.masks.get(number)
        if masks is None or place not in masks.rows:
            token_id = next_token(entries)
        else:
            bits = masks.bits[masks.rows.tolist().index(place)]
            token_id = pick(entries, [i for i in range(VOCAB) if bits[i // 32] >> np.uint32(i % 32) & 1])
        self.chosen[number, row] = token_id
        return token_id


class Follower(PagedOracle):
    """Executor of another rank: it gets the sampled tokens and has no grammars."""

    def __init__(self, num_blocks: int, limits: SchedulerLimits, chosen: dict[tuple[int, int], int]) -> None:
        super().__init__(num_blocks, limits)
        self.chosen = chosen

    def choose(self, step: OracleStep, row: int, entries: list[int]) -> int:
        return self.chosen[step.batch.number, row]


class Turning(ListLink):
    """Script of messages during which pending grammars become ready."""

    def __init__(self, script: list[list[ToEngine]], compiler: Compiler) -> None:
        super().__init__(script)
        self.compiler = compiler

    def receive(self, block: bool, plan: bytes = b"") -> list[ToEngine]:
        self.compiler.turn()
        return super().receive(block, plan)


class Told:
    """Link that records the messages for all ranks, by step, as `Broadcast` sends them."""

    def __init__(self, inner: Link) -> None:
        self.inner, self.messages = inner, list[list[ToScheduler]]()

    def receive(self, block: bool, plan: bytes = b"") -> list[ToScheduler]:
        self.messages.append(list(self.inner.receive(block, plan)))
        return list(self.messages[-1])

    def send(self, outputs: list[Output], stats: Stats) -> None:
        self.inner.send(outputs, stats)


class Compiler:
    """Compiler whose grammars are ready some steps later, out of order. A `source` that is not a number is invalid."""

    end_ids = ENDS

    def __init__(self, rng: random.Random, most_turns: int = 6) -> None:
        self.rng, self.most_turns = rng, most_turns
        self.open: list[tuple[int, Future[Automaton], GrammarSpec]] = []
        self.now = 0

    def compile(self, spec: GrammarSpec) -> Future[Automaton]:
        future: Future[Automaton] = Future()
        self.open.append((self.now + self.rng.randint(0, self.most_turns), future, spec))
        return future

    def fill(self, matchers: Any, mask: Any, rows: Any) -> None:
        for matcher, row in zip(matchers, rows, strict=True):
            matcher.fill_mask(mask, row)

    def turn(self) -> None:
        self.now += 1
        for item in [item for item in self.open if item[0] <= self.now]:
            self.open.remove(item)
            _, future, spec = item
            if not future.set_running_or_notify_cancel():
                continue
            if spec.source.isdecimal():
                future.set_result(Automaton(int(spec.source)))
            else:
                future.set_exception(GrammarError("this is no grammar", param="grammar"))


class Ready(Compiler):
    """Compiler whose grammars are ready in the next step."""

    def compile(self, spec: GrammarSpec) -> Any:
        future = super().compile(spec)
        self.now += 100
        self.turn()
        return future


class House:
    """An engine with constraints over the oracle, with its links in the order of `runtime.links`."""

    def __init__(
        self, script: list[list[ToEngine]], num_blocks: int, limits: SchedulerLimits, *, seed: int = 0,
        full_rate: float = 0.0, **how: Any,
    ) -> None:  # fmt: skip
        self.compiler = Compiler(random.Random(seed), **how)
        self.constraints = Constraints(VOCAB, self.compiler)
        self.link = Turning(script, self.compiler)
        self.gated = Gated(self.link, [self.constraints])
        self.extended = Extended(self.gated, self.constraints)
        self.told = Told(self.extended)
        self.oracle = Guided(num_blocks, limits, self.constraints)
        self.oracle.full_rate = full_rate
        self.scheduler = Scheduler(BlockPool(num_blocks, limits.block_size), limits)
        self.engine = Engine(self.scheduler, self.oracle, Timed(self.told, self.scheduler))

    def run(self, check: Callable[[], None] = lambda: None) -> None:
        """Step until every request has ended, and check the books after every step."""
        for _ in range(20_000):
            self.engine.step()
            check_books(self.scheduler, self.scheduler.limits.stride)
            check()
            if not self.link.script and self.engine.idle and not self.gated.holds:
                self.engine.step()  # sends the last refusals
                self.gated.close()
                return
        raise AssertionError("the engine does not come to rest")

    def reason(self, request_id: int) -> str:
        return self.link.outputs[request_id][-1].finish_reason
