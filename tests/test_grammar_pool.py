"""The compile pool: costly grammars are ended by their limits, other ones go on, none is compiled twice."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import psutil
import pytest
from support_grammar import END, accepts, backend, small_vocabulary

from tokenmill.errors import GenerationError, GrammarError
from tokenmill.grammar import schema
from tokenmill.grammar.base import Grammar
from tokenmill.grammar.pool import CompilePool, PoolLimits
from tokenmill.wire.messages import GrammarSpec

SLOW = GrammarSpec("json_schema", '{"type":"integer","multipleOf":999983}')  # tables of a million states
DEEP = GrammarSpec(
    "json_schema", schema.canonical({"type": "object", "properties": {f"k{i}": {} for i in range(12_000)}})
)


@pytest.fixture(scope="module")
def pool() -> Iterator[CompilePool]:
    made = CompilePool(backend(), PoolLimits(cpu_s=0.5, clock_s=1.5, memory_bytes=256 << 20))
    made.submit(GrammarSpec("regex", "warm")).result(60)
    yield made
    made.close()


def fault(future: Future[Grammar], within_s: float) -> str:
    began = time.monotonic()
    with pytest.raises(GrammarError) as caught:
        future.result(20)
    assert time.monotonic() - began < within_s
    return str(caught.value)


def test_a_grammar_comes_back_usable(pool: CompilePool) -> None:
    grammar = pool.submit(GrammarSpec("regex", "ab+")).result(10)
    assert accepts(grammar, "abb")
    assert not accepts(grammar, "a")
    assert grammar.nbytes > 0


def test_what_costs_too_much_is_ended_within_two_seconds_and_others_go_on(pool: CompilePool) -> None:
    killed = pool.num_killed
    slow = pool.submit(SLOW)
    times = []
    for number in range(20):
        began = time.monotonic()
        assert accepts(pool.submit(GrammarSpec("regex", f"other{number}")).result(10), f"other{number}")
        times.append(time.monotonic() - began)
    assert sorted(times)[10] < 0.2  # one of two processes is busy
    assert "too costly" in fault(slow, 2.0)
    assert pool.num_killed == killed + 1
    assert accepts(pool.submit(GrammarSpec("regex", "after")).result(60), "after")


def test_cpu_time_is_limited() -> None:
    patient = CompilePool(backend(), PoolLimits(cpu_s=0.2, clock_s=30, processes=1))
    try:
        patient.submit(GrammarSpec("regex", "warm")).result(60)
        assert "0.2 s of CPU time" in fault(patient.submit(SLOW), 10)
    finally:
        patient.close()


def test_recursion_ends_a_process_of_the_pool_alone(pool: CompilePool) -> None:
    assert "too many levels" in fault(pool.submit(DEEP), 10.0)
    assert accepts(pool.submit(GrammarSpec("regex", "alive")).result(60), "alive")


def test_a_large_schema_is_refused_for_what_is_wrong_and_not_for_its_size(pool: CompilePool) -> None:
    properties: dict[str, object] = {f"k{i}": {"type": "string", "maxLength": i} for i in range(1500)}
    wrong = {"oneOf": [{"minimum": 1}, {"maximum": 5}]}
    source = schema.canonical({"properties": {**properties, "wrong": wrong, "x": True}})
    message = fault(pool.submit(GrammarSpec("json_schema", source)), 5.0)
    assert message.startswith("The JSON schema cannot be used: at #/properties")
    assert "exclusive" in message


def test_memory_is_limited() -> None:
    limits = PoolLimits(memory_bytes=48 << 20, processes=1, cpu_s=10, clock_s=15)
    small = CompilePool(backend(), limits)
    try:
        message = fault(small.submit(SLOW), 16)
        assert "memory" in message or "too large" in message
        assert accepts(small.submit(GrammarSpec("regex", "a")).result(60), "a")
    finally:
        small.close()


def test_the_same_grammar_is_compiled_once_and_refusals_are_remembered(pool: CompilePool) -> None:
    before = pool.num_compiled, pool.num_refused
    afters = [after for after in ((), ((END,),), ()) for _ in range(4)]
    futures = [pool.submit(GrammarSpec("regex", "same[0-9]+", after)) for after in afters]
    grammars = [future.result(10) for future in futures]
    assert pool.num_compiled == before[0] + 1
    assert accepts(grammars[0], "same1")
    assert all(grammar is grammars[0] for grammar in grammars)  # `after` does not matter to the pool
    bad = GrammarSpec("regex", "(broken")
    errors = {fault(pool.submit(bad), 2) for _ in range(3)}
    assert len(errors) == 1
    assert "closed" in errors.pop()
    assert pool.num_refused == before[1] + 1
    began = time.monotonic()
    assert pool.submit(GrammarSpec("regex", "same[0-9]+")).done()
    assert time.monotonic() - began < 0.05


def test_the_cache_forgets_what_was_used_least_recently() -> None:
    chosen = backend()
    pool = CompilePool(chosen, PoolLimits(cache_bytes=200_000, processes=1))
    try:
        first, second, third = (GrammarSpec("regex", text * 50) for text in "abc")  # about 71 kB each
        for spec in (first, second, first, third):  # the second is the oldest when the third comes
            pool.submit(spec).result(60)
        assert pool.submit(first).done()
        assert not pool.submit(second).done()
    finally:
        pool.close()


def test_large_sources_are_refused_without_a_process(pool: CompilePool) -> None:
    future = pool.submit(GrammarSpec("lark", "x" * 1_000_000))
    assert future.done()
    assert "at most" in fault(future, 0.1)


def own_workers() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "tokenmill.grammar.worker" in p.cmdline()]


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="threads of one process have one priority here")
def test_a_process_starts_at_idle_priority_and_compiles_at_normal_priority() -> None:
    before = {p.pid for p in own_workers()}
    lazy = CompilePool(backend(), PoolLimits(processes=1))
    try:
        until = time.monotonic() + 60
        policies: list[int] = []
        while os.SCHED_IDLE not in policies and time.monotonic() < until:
            time.sleep(0.002)
            for process in own_workers():
                if process.pid not in before:
                    threads = sorted(int(task.name) for task in Path(f"/proc/{process.pid}/task").iterdir())
                    policies = [os.sched_getscheduler(thread) for thread in threads]
        assert policies == [os.SCHED_IDLE, os.SCHED_OTHER]
    finally:
        lazy.close()


def test_a_grammar_that_comes_before_a_lazy_start_is_over_gets_a_process_that_does_not_give_way() -> None:
    before = {p.pid for p in own_workers()}
    pool = CompilePool(backend(), PoolLimits(processes=1))
    try:
        assert accepts(pool.submit(GrammarSpec("regex", "at once")).result(60), "at once")
        (process,) = [p for p in own_workers() if p.pid not in before]
        assert process.cmdline()[-1] == "now"
        assert accepts(pool.submit(GrammarSpec("regex", "later")).result(60), "later")
        assert process.is_running()
    finally:
        pool.close()


def test_where_a_grammar_is_waited_for_one_process_does_not_give_way() -> None:
    before = {p.pid for p in own_workers()}
    pool = CompilePool(backend(), PoolLimits(processes=2), awaited=True)
    try:
        assert accepts(pool.submit(GrammarSpec("regex", "awaited")).result(60), "awaited")
        started = [p.cmdline()[-1] for p in own_workers() if p.pid not in before]
        assert "now" in started
    finally:
        pool.close()


def test_a_process_that_ended_while_it_waited_is_replaced(pool: CompilePool) -> None:
    for process in own_workers():
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # all its threads have ended; the pool reaps it
    assert accepts(pool.submit(GrammarSpec("regex", "behind the dead")).result(60), "behind the dead")


def test_a_cancelled_request_does_not_cancel_another_with_the_same_grammar(pool: CompilePool) -> None:
    spec = GrammarSpec("regex", "cancelled")
    first, second = pool.submit(spec), pool.submit(spec)
    first.cancel()
    assert accepts(second.result(10), "cancelled")


def test_closing_ends_the_processes_and_what_still_waits() -> None:
    pool = CompilePool(backend(), PoolLimits(processes=1, cpu_s=0.5))
    pool.submit(GrammarSpec("regex", "a")).result(60)
    children = [p for p in psutil.Process().children() if "tokenmill.grammar.worker" in " ".join(p.cmdline())]
    assert children
    mine = children[-1]
    pool.submit(SLOW)
    pool.close()
    assert not mine.is_running()
    late = pool.submit(GrammarSpec("regex", "late"))
    with pytest.raises(GenerationError):
        late.result(10)


def test_the_vocabulary_crosses_the_border_whole() -> None:
    import msgspec

    vocabulary = small_vocabulary()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(vocabulary), type=type(vocabulary)) == vocabulary
