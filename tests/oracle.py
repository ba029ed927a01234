"""Executor whose cache entries are hashes of everything before them: an oracle for the scheduler.

Any mistake in scheduling, paging, prefix sharing, preemption or overlap produces a wrong token, on a CPU in
milliseconds. As a backend, it keeps state by slot and reads only the changes in a batch. It computes a step only when
the next one is launched, from the arrays of the launch, so a change of a launched batch is detected.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from hashlib import blake2b

import numpy as np

from tokenmill.backends.base import StepResult
from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.engine import Engine, digest
from tokenmill.engine.limits import SchedulerLimits
from tokenmill.engine.scheduler import Scheduler
from tokenmill.engine.sequence import Batch, Sequence
from tokenmill.errors import OutOfMemory
from tokenmill.wire.messages import (
    Abort,
    Output,
    Payload,
    PromptDetails,
    Request,
    SamplingParams,
    Stats,
    StoppingParams,
    ToEngine,
    TokenDetails,
)

EOS, VOCAB, POISON = 0, 50, -1


def number(*items: object) -> int:
    """Return a 64-bit hash of the items."""
    return int.from_bytes(blake2b(repr(items).encode(), digest_size=8).digest(), "little")


def cache_entry(token_id: int, earlier: list[int], salt: bytes) -> int:
    """Return the cache entry of a token in one table. Like a key and value, it depends on what the token attends to."""
    return POISON if POISON in earlier else number(token_id, earlier, salt)


def next_token(entries: list[int]) -> int:
    """Return the token that follows these cache entries; -1 if one of them is poisoned."""
    return -1 if POISON in entries else number(entries) % VOCAB


def attended(position: int, window: int) -> range:
    """Return the positions that a token at `position` attends to, without its own. `window` 0: all."""
    return range(max(0, position + 1 - window) if window else 0, position)


def salt_of(salt: bytes, table: int) -> bytes:
    """Return the salt of a table: its entries are those of no other table."""
    return salt + bytes(table)


def reference(request: Request, windows: tuple[int, ...] = (0,)) -> list[int]:
    """Return the tokens of a request, computed as one sequence without paging. `windows`: as in the limits."""
    tables: list[list[int]] = [[] for _ in windows]

    def add(token_id: int) -> None:
        for table, (entries, window) in enumerate(zip(tables, windows, strict=True)):
            seen = [entries[i] for i in attended(len(entries), window)]
            entries.append(cache_entry(token_id, seen, salt_of(request.salt, table)))

    for token_id in request.prompt_ids:
        add(token_id)
    out: list[int] = []
    stopping = request.stopping
    while len(out) < stopping.max_new_tokens and (not out or out[-1] not in stopping.stop_ids):
        views = [entries[-window:] for entries, window in zip(tables, windows, strict=True)]
        out.append(next_token([entry for view in views for entry in view]))
        add(out[-1])
    return out


@dataclass
class Left:
    """State of the scheduler after a batch was planned."""

    behind: int  # number of waiting sequences
    filling: dict[int, int]  # arrival by id, of sequences with partly computed prompts, this step included


@dataclass
class OracleStep:
    """A launched step, with copies of its inputs."""

    batch: Batch
    admitted: list[tuple[int, Request, list[int]]]  # copies as of the launch
    requests: list[Request]
    failed: bool = False


class PagedOracle:
    """Executor that reads and writes its cache through block tables, as attention does.

    `poison_rate`: probability that a row fails. `full_rate`: probability that a launch, or a collect, is out of memory.
    `most`: a launch of more tokens always is.
    """

    def __init__(self, num_blocks: int, limits: SchedulerLimits, poison_rate: float = 0.0, seed: int = 0) -> None:
        size, slots = limits.block_size, limits.max_batch_size
        self.size, self.windows = size, limits.windows
        self.cache: list[int | None] = [None] * (num_blocks * size)
        self.tokens: list[list[int | None]] = [[None] * (limits.max_total_tokens + 1) for _ in range(slots)]
        self.tables: list[list[dict[int, int]]] = [[{} for _ in limits.windows] for _ in range(slots)]
        self.queue: list[OracleStep] = []
        self.plans: list[bytes] = []
        self.batches: list[Batch] = []
        self.left: list[Left] = []  # by batch
        self.look: Callable[[], Left] = lambda: Left(0, {})
        self.poison_rate, self.rng, self.num_poisoned = poison_rate, random.Random(seed), 0
        self.full_rate, self.most, self.num_full = 0.0, limits.max_batch_tokens, [0, 0]
        self.stride, self.most_in_flight = limits.stride, 0
        self.sampled: dict[int, tuple[int, int]] = {}  # by slot: the batch that samples its last token, its position
        self.needs: dict[int, int] = {}  # by batch: the newest batch of which it computes a sampled token
        self.collected = 0  # number of the last batch that was collected
        self.rests: list[int] = []  # number of launches before each unit of idle work
        self.num_rests = self.rng.randint(0, 9)  # units of idle work left

    def launch(self, batch: Batch) -> OracleStep:
        admitted = [(seq.slot, seq.request, list(seq.token_ids)) for seq in batch.admitted]
        step = OracleStep(batch, admitted, [seq.request for seq in batch.sequences])
        self.plans.append(digest(batch))
        self.batches.append(batch)
        self.left.append(self.look())
        self.check_needs(batch)
        if batch.num_tokens > self.most or self.rng.random() < self.full_rate:
            self.num_full[0] += 1
            if self.rng.random() < 0.5:  # fails halfway: a part runs, and its results are not read
                step.failed = True
                self.queue.append(step)
            raise OutOfMemory("no room for a launch")
        self.queue.append(step)
        self.most_in_flight = max(self.most_in_flight, sum(not step.failed for step in self.queue))
        return step

    def check_needs(self, batch: Batch) -> None:
        """Assert that a batch computes no token that one of the last `stride` - 1 batches still samples."""
        for slot in [seq.slot for seq in batch.admitted] + batch.host_tokens[:, 0].tolist():
            self.sampled.pop(slot, None)
        self.needs[batch.number] = 0
        rows = zip(batch.slots.tolist(), batch.starts.tolist(), batch.counts.tolist(), strict=True)
        for slot, start, count in rows:
            number, position = self.sampled.get(slot, (0, 0))
            if start <= position < start + count and number > self.collected:
                assert number <= batch.number - self.stride, "it would wait for the token"
                self.needs[batch.number] = max(number, self.needs[batch.number])
        for row in batch.samples.tolist():
            self.sampled[int(batch.slots[row])] = batch.number, int(batch.starts[row] + batch.counts[row])

    def complete(self, step: OracleStep) -> None:
        assert step is self.queue[-1], "nothing is launched between a step and its completion"
        assert self.needs[step.batch.number] <= self.collected, "the tokens of its rows are on the host"

    def collect(self, step: OracleStep) -> StepResult:
        while self.queue[0].failed and self.queue[0] is not step:
            self.run(self.queue.pop(0))
        assert self.queue.pop(0) is step, "steps are collected in the order of their launches"
        self.collected = step.batch.number
        if step.failed:
            raise OutOfMemory("behind one that failed")
        if self.rng.random() < self.full_rate:
            self.num_full[1] += 1
            self.queue = [behind for behind in self.queue if not behind.failed]
            for behind in self.queue:
                behind.failed = True
            if self.rng.random() < 0.5:
                self.run(step)
            raise OutOfMemory("no room for a step")
        return self.run(step)

    def idle_work(self) -> bool:
        assert not self.queue or all(step.failed for step in self.queue), "a step is on the device"
        self.rests.append(len(self.batches))
        return len(self.rests) < self.num_rests

    def run(self, step: OracleStep) -> StepResult:
        """Compute a step from the changes in its batch."""
        batch = step.batch
        for slot, _, token_ids in step.admitted:
            self.tokens[slot][:] = token_ids + [None] * (len(self.tokens[slot]) - len(token_ids))
            self.tables[slot] = [{} for _ in self.windows]
        for slot, position, token_id in batch.host_tokens.tolist():
            self.tokens[slot][position] = token_id
        for which, slot, index, block in batch.blocks.tolist():
            table = self.tables[slot][which]
            assert index == max(table, default=index - 1) + 1, "a table's entries come in order, once"
            assert index == 0 or table or self.windows[which], "only a table with a window has no first entry"
            table[index] = block
        found: dict[int, int] = {}
        details: list[TokenDetails | None] = []
        payloads: dict[int, Payload] = {}
        samples = set(batch.samples.tolist())
        rows = zip(batch.slots.tolist(), batch.starts.tolist(), batch.counts.tolist(), strict=True)
        for row, (slot, start, count) in enumerate(rows):
            request, end = step.requests[row], start + count
            entries = self.compute(slot, start, end, request.salt)
            if row in samples:
                found[row] = self.tokens[slot][end] = self.choose(step, row, entries)
                details.append(TokenDetails(float(end)) if request.sampling.logprobs >= 0 else None)
            positions = range(start + 1, min(end + 1, len(request.prompt_ids)))
            if request.sampling.prompt_logprobs >= 0 and positions:
                payloads[row] = PromptDetails(start + 1, tuple(TokenDetails(float(p)) for p in positions))
        wanted = details if any(detail is not None for detail in details) else None
        return StepResult([found[row] for row in batch.samples.tolist()], wanted, payloads or None)

    def choose(self, step: OracleStep, row: int, entries: list[int]) -> int:
        """Return the sampled token of a row. Overridden by executors with constraints."""
        return next_token(entries)

    def compute(self, slot: int, start: int, end: int, salt: bytes) -> list[int]:
        """Return the cache entries that the last token attends to. Entries of [start, end) are written now."""
        assert end > start
        poisoned = self.rng.random() < self.poison_rate
        self.num_poisoned += poisoned
        seen: list[int] = []
        for which, (table, window) in enumerate(zip(self.tables[slot], self.windows, strict=True)):
            seen += self.compute_table(table, window, self.tokens[slot], range(start, end), salt_of(salt, which))
            if poisoned:
                self.cache[table[(end - 1) // self.size] * self.size + (end - 1) % self.size] = seen[-1] = POISON
        return seen

    def compute_table(
        self, table: dict[int, int], window: int, tokens: list[int | None], positions: range, salt: bytes
    ) -> list[int]:
        """Write the entries of `positions` in one table. Return those that the last of them attends to, and its own."""
        first = attended(positions[0], window).start
        where = {i: table[i // self.size] * self.size + i % self.size for i in range(first, positions.stop)}
        entries = {i: self.cache[where[i]] for i in range(first, positions[0])}
        for i in positions:
            assert tokens[i] is not None, "computed before it was sampled"
            entries[i] = cache_entry(tokens[i], [entries[j] for j in attended(i, window)], salt)
            self.cache[where[i]] = entries[i]
        return [entries[j] for j in (*attended(positions[-1], window), positions[-1])]


class ListLink:
    """Link with scripted messages, one list per step. Outputs are collected in lists by request."""

    def __init__(self, script: list[list[ToEngine]]) -> None:
        self.script = [list(messages) for messages in script]
        self.outputs: dict[int, list[Output]] = {}
        self.stats = Stats()
        self.idle_turns = 0
        self.wakes = 0

    def wake(self) -> None:
        self.wakes += 1

    def receive(self, block: bool, plan: bytes = b"") -> list[ToEngine]:
        self.idle_turns += block
        return self.script.pop(0) if self.script else []

    def send(self, outputs: list[Output], stats: Stats) -> None:
        self.stats = stats
        for output in outputs:
            self.outputs.setdefault(output.request_id, []).append(output)

    def tokens(self, request_id: int) -> list[int]:
        return [token_id for output in self.outputs.get(request_id, ()) for token_id in output.token_ids]


@dataclass
class Case:
    """A random history: requests, aborts, and limits."""

    requests: list[Request]
    aborted: set[int]
    script: list[list[ToEngine]]
    num_blocks: int
    limits: SchedulerLimits
    hopeless: set[int] = field(default_factory=set)  # too long for the limits


def request(
    request_id: int,
    prompt: list[int] | tuple[int, ...] | range,
    max_new_tokens: int = 1,
    *,
    stop_ids: tuple[int, ...] = (),
    salt: bytes = b"",
    sampling: SamplingParams | None = None,
) -> Request:
    """Return a greedy request, unless `sampling` is given."""
    stopping = StoppingParams(max_new_tokens, stop_ids=stop_ids)
    return Request(request_id, tuple(prompt), sampling or SamplingParams(), stopping, salt)


def random_case(seed: int, aborts: bool = True) -> Case:
    """Return a case with few blocks, long outputs, shared and repetitive prompts: preemption and hits are common."""
    rng = random.Random(seed)
    size, longest = rng.choice([1, 2, 4, 16]), rng.randint(2, 60)
    alphabet, salts = rng.choice([2, VOCAB]), rng.choice([[b""], [b"", b"a", b"b"]])
    head = [rng.randrange(1, alphabet) for _ in range(longest)]
    requests: list[Request] = []
    hopeless: set[int] = set()
    for i in range(rng.randint(1, 25)):
        n = rng.randint(1, max(1, longest // 2))
        prompt = head[: rng.randint(0, n)]
        prompt += [rng.randrange(1, alphabet) for _ in range(n - len(prompt))]
        new = rng.randint(1, longest - n)
        if rng.random() < 0.03:
            new += longest
            hopeless.add(i)
        sampling = SamplingParams(logprobs=rng.choice([-1, -1, 0]), prompt_logprobs=rng.choice([-1, -1, -1, 0]))
        stop_ids = (EOS,) if rng.random() < 0.5 else ()
        requests.append(request(i, prompt, new, stop_ids=stop_ids, salt=rng.choice(salts), sampling=sampling))
    aborted = {r.id for r in requests if aborts and rng.random() < 0.15}
    script: list[list[ToEngine]] = []
    queue = list(requests)
    while queue:
        k = rng.randint(0, 5)
        script.append(list(queue[:k]))
        queue = queue[k:]
    for i in sorted(aborted):
        born = next(turn for turn, messages in enumerate(script) if any(m.id == i for m in messages))
        turn = born + rng.randint(0, 40)
        script += [[] for _ in range(turn + 1 - len(script))]
        script[turn].append(Abort(i))
    max_batch_tokens = rng.randint(1, 40)
    size_limits = (max_batch_tokens, rng.randint(1, 8), longest, size)
    limits = SchedulerLimits(
        *size_limits, min_chunk=rng.choice([1, 1, 8]), prefill_beside=rng.choice([0, 8, 11]),
        context_weight=rng.choice([0, 0, 1, 5, 40]), max_chunk=rng.choice([0, 0, 2, 10]),
    )  # fmt: skip
    return Case(requests, aborted, script, -(-longest // size) + rng.randint(0, 3), limits, hopeless)


def windowed_case(seed: int, aborts: bool = True) -> Case:
    """Return a random case whose sequences have several block tables, some with a window, or one with a window."""
    case, rng = random_case(seed, aborts), random.Random(-1 - seed)
    windows = tuple(rng.choice([0, 1, 2, 3, 5, 8, 17]) for _ in range(rng.randint(1, 3)))
    limits = replace(case.limits, windows=windows if any(windows) else (*windows, 4))
    blocks = limits.tables.blocks_of(limits.max_total_tokens) + rng.randint(0, 3)
    return replace(case, limits=limits, num_blocks=blocks)


def with_stride(case: Case, stride: int) -> Case:
    """Return the case for so many steps on the device. Its script can be used again."""
    return replace(case, script=[list(turn) for turn in case.script], limits=replace(case.limits, stride=stride))


def build(
    script: list[list[ToEngine]], num_blocks: int, limits: SchedulerLimits, *, poison_rate: float = 0.0,
    full_rate: float = 0.0,
) -> tuple[Engine[OracleStep], PagedOracle, ListLink]:  # fmt: skip
    """Return an engine over a new oracle, with messages from `script`."""
    oracle, link = PagedOracle(num_blocks, limits, poison_rate), ListLink(script)
    oracle.full_rate = full_rate
    scheduler = Scheduler(BlockPool(num_blocks, limits.block_size), limits)
    oracle.look = lambda: left_by(scheduler)
    return Engine(scheduler, oracle, link), oracle, link


def run(engine: Engine[OracleStep], link: ListLink, max_steps: int = 20_000) -> None:
    """Step until every request has ended, and check the books after every step."""
    for _ in range(max_steps):
        engine.step()
        check_books(engine.scheduler, engine.scheduler.limits.stride)
        if not link.script and engine.idle:
            return
    raise AssertionError("the engine does not come to rest")


def check_books(scheduler: Scheduler, depth: int = 1) -> None:
    """Assert that running sequences hold exactly the used blocks and distinct slots, and waiting ones hold none.

    `depth`: most steps on the device.
    """
    pool = scheduler.pool
    pool.check()
    used = [block for seq in scheduler.running.values() for blocks in seq.blocks for block in blocks]
    assert sum(pool.refs) == len(used), "a block is leaked or used after its release"
    for seq in scheduler.running.values():
        check_tables(seq, scheduler, depth)
    slots = [seq.slot for seq in scheduler.running.values()]
    assert len(set(slots)) == len(slots)
    assert min(slots, default=0) >= 0
    assert all(seq.slot == -1 and not seq.blocks for seq in scheduler.waiting.values())


def check_tables(seq: Sequence, scheduler: Scheduler, depth: int) -> None:
    """Assert that a running sequence holds the blocks that its next step needs, and few others."""
    size, computed = scheduler.limits.block_size, scheduler.running.computed_of(seq)
    step, late = -(-scheduler.limits.max_batch_tokens // size), -(-depth // size)
    decoding = computed > seq.prefill_end
    for first, blocks, window in zip(seq.firsts, seq.blocks, scheduler.limits.windows, strict=True):
        assert len(set(blocks)) == len(blocks)
        assert (first + len(blocks)) * size >= computed
        assert first * size <= attended(computed, window).start
        if window:
            assert len(blocks) <= -(-(window - 1) // size) + 1 + (late if decoding else max(step, late) + step)


def check_request(r: Request, case: Case, link: ListLink) -> None:
    """Assert that a request got the tokens and the end of its reference, or the refusal that it must get."""
    outputs, got, want = link.outputs.get(r.id, []), link.tokens(r.id), reference(r, case.limits.windows)
    if r.id in case.hopeless and outputs:
        assert [o.finish_reason for o in outputs] == ["error"]
        assert str(len(r.prompt_ids) + r.stopping.max_new_tokens) in outputs[0].message
        return
    finished = [o.finish_reason for o in outputs if o.finish_reason]
    if r.id in case.aborted and not finished:
        assert got == want[: len(got)]
    else:
        assert got == want
        assert finished == ["stop" if want[-1] in r.stopping.stop_ids else "length"] == [outputs[-1].finish_reason]
    if outputs:
        assert not outputs[0].token_ids, "the first output tells of the admission"
        check_details(r, case, link)


def prompt_details_of(outputs: Iterable[Output]) -> list[TokenDetails]:
    """Return the prompt details of a request, assembled as every receiver does."""
    found: list[TokenDetails] = []
    for output in outputs:
        if output.payload is not None:
            assert 1 <= output.payload.start <= len(found) + 1, "no position is left out"
            found += output.payload.after(len(found))
    return found


def check_details(r: Request, case: Case, link: ListLink) -> None:
    """Assert that log-probabilities of tokens and prompt are complete, in order, and only as requested."""
    outputs, n = link.outputs[r.id], len(r.prompt_ids)
    details = [detail.logprob for o in outputs for detail in o.details]
    assert details == ([n + i for i in range(len(link.tokens(r.id)))] if r.sampling.logprobs >= 0 else [])
    prompt_details = [detail.logprob for detail in prompt_details_of(outputs)]
    if r.sampling.prompt_logprobs < 0:
        assert not prompt_details
    elif r.id in case.aborted:
        assert prompt_details == list(range(1, len(prompt_details) + 1))
    else:
        assert prompt_details == list(range(1, n)), "every position of the prompt, once and in order"


def prompt_cost(start: int, count: int, weight: int) -> float:
    """Return the cost of prompt tokens from `start` on, in tokens at position 0."""
    return sum(1 + (position / weight if weight else 0) for position in range(start, start + count))


def left_by(scheduler: Scheduler) -> Left:
    """Return the state of the scheduler."""
    running = scheduler.running
    filling = {seq.id: seq.arrival for seq in running.values() if running.computed_of(seq) < seq.prefill_end}
    return Left(len(scheduler.waiting), filling)


def check_prompts_beside(batch: Batch, left: Left, limits: SchedulerLimits) -> None:
    """Assert that prompts beside decoding sequences cost little, except for the guaranteed part of the oldest."""
    first_new = len(batch.slots) - len(batch.admitted)
    rows = list(zip(batch.starts.tolist(), batch.counts.tolist(), batch.sequences, strict=True))
    decoding = sum(count == 1 and seq.id not in left.filling for _, count, seq in rows[:first_new])
    prompts = [
        row for index, row in enumerate(rows) if index >= first_new or row[1] > 1 or row[2].id in left.filling
    ]
    if not decoding or not limits.prefill_beside or not prompts:
        return
    waiting = left.behind + len(prompts)
    waiting += sum(i not in [seq.id for _, _, seq in prompts] for i in left.filling)
    allowed = limits.prefill_beside * max(1, waiting * waiting // decoding) + decoding
    least = max(limits.min_chunk, min(limits.block_size, limits.prefill_beside))
    costs = {seq.arrival: prompt_cost(start, count, limits.context_weight) for start, count, seq in prompts}
    total = sum(costs.values())
    if total > allowed + 1e-6:
        _, count, oldest = min(prompts, key=lambda row: row[2].arrival)
        assert count <= least, "only its least is given whatever it costs"
        assert total - costs[oldest.arrival] <= allowed / 2 + 1e-6


def check_share_of_the_oldest(batch: Batch, left: Left, limits: SchedulerLimits) -> None:
    """Assert that the oldest prompt gets at least as much of a step that does not finish it as all younger ones."""
    first_new, weight = len(batch.slots) - len(batch.admitted), limits.context_weight
    prompts = [
        (seq.arrival, count, prompt_cost(start, count, weight), prompt_cost(start, count + 1, weight))
        for row, (seq, start, count) in enumerate(
            zip(batch.sequences, batch.starts.tolist(), batch.counts.tolist(), strict=True)
        )
        if row >= first_new or count > 1 or seq.id in left.filling
    ]
    if not left.filling or min(prompts, default=(0,))[0] < min(left.filling.values()):
        return  # the oldest is finished
    oldest, count, _, more = min(prompts)
    assert oldest == min(left.filling.values()), "it is computed in every step"
    others = [prompt for prompt in prompts if prompt[0] > oldest]
    assert sum(p[1] for p in others) <= count + 1 or sum(p[2] for p in others) <= more + 1e-6


def check_plans(oracle: PagedOracle, limits: SchedulerLimits) -> None:
    """Assert that every batch respects the limits and the rules for prompts."""
    for batch, left in zip(oracle.batches, oracle.left, strict=True):
        assert batch.num_tokens == batch.counts.sum() <= limits.max_batch_tokens
        assert batch.counts.min() >= 1
        assert 0 < len(batch.slots) == len(batch.sequences) <= limits.max_batch_size
        assert len(set(batch.slots.tolist())) == len(batch.slots)
        cut = np.setdiff1d(np.arange(len(batch.slots)), batch.samples)
        assert (batch.counts[cut] >= min(limits.min_chunk, limits.max_batch_tokens)).all()
        assert len(cut) <= 2, "the oldest, and one that may overtake it"
        classes = limits.size_class(0, limits.max_total_tokens)
        assert len(left.filling) <= classes + 2, "who begins is shorter than those in the middle"
        check_prompts_beside(batch, left, limits)
        check_share_of_the_oldest(batch, left, limits)


def check_history(case: Case, met: Counter[str]) -> PagedOracle:
    """Check every token, plan and block of a history, and that a second rank plans the same. Count what it meets."""
    engine, oracle, link = build(case.script, case.num_blocks, case.limits)
    run(engine, link)
    for r in case.requests:
        check_request(r, case, link)
    check_plans(oracle, case.limits)
    assert not any(engine.scheduler.pool.refs), "blocks leaked"

    replica, other, _ = build(case.script, case.num_blocks, case.limits)
    run(replica, replica.link)
    assert other.plans == oracle.plans, "two ranks would disagree"
    met["preempted"] += link.stats.preemptions
    met["hits"] += link.stats.cached_tokens
    met["chunked"] += sum(len(batch.slots) - len(batch.samples) for batch in oracle.batches)
    met["overlapped"] += oracle.most_in_flight > case.limits.stride
    assert oracle.most_in_flight <= case.limits.stride + 1
    return oracle


def first_step_of(oracle: PagedOracle, request_id: int) -> tuple[int, int]:
    """Return start and count of the first row of a request."""
    for batch in oracle.batches:
        for row, seq in enumerate(batch.sequences):
            if seq.id == request_id:
                return int(batch.starts[row]), int(batch.counts[row])
    raise AssertionError
