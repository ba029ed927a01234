"""The engine without a model: scripted tokens, times, details and faults."""

from __future__ import annotations

import time

import pytest
from oracle import ListLink, prompt_details_of, request

from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.engine import Engine
from tokenmill.engine.scheduler import Scheduler, SchedulerLimits
from tokenmill.errors import ArgumentError
from tokenmill.runtime.mock import Fault, MockExecutor, MockStep, parse_faults
from tokenmill.wire.messages import Request, SamplingParams, StoppingParams

SCRIPT, EOS = (11, 12, 13), 2


def serve(requests: list[Request], executor: MockExecutor, num_blocks: int = 64, budget: int = 64) -> ListLink:
    link = ListLink([list(requests)])
    limits = SchedulerLimits(budget, 8, 400, block_size=4)
    engine: Engine[MockStep] = Engine(Scheduler(BlockPool(num_blocks, 4), limits), executor, link)
    while link.script or not engine.idle:
        engine.step()
    return link


def test_a_request_gets_the_script_and_then_its_stop_id() -> None:
    link = serve([request(0, range(1, 9), 50, stop_ids=(EOS,))], MockExecutor(SCRIPT))
    assert link.tokens(0) == [*SCRIPT, EOS]
    assert link.outputs[0][-1].finish_reason == "stop"


def test_without_a_stop_id_the_script_begins_again() -> None:
    link = serve([request(0, [1], 7)], MockExecutor(SCRIPT))
    assert link.tokens(0) == [11, 12, 13, 11, 12, 13, 11]


def test_it_does_not_stop_before_the_least_number_of_tokens() -> None:
    r = Request(0, (1, 2), SamplingParams(), StoppingParams(50, min_new_tokens=5, stop_ids=(EOS,)))
    assert serve([r], MockExecutor(SCRIPT)).tokens(0) == [11, 12, 13, 11, 12, EOS]


def test_chunks_and_preemption_do_not_change_the_script() -> None:
    requests = [request(i, range(20 * i + 1, 20 * i + 11), 20) for i in range(4)]
    link = serve(requests, MockExecutor(SCRIPT), num_blocks=12, budget=7)
    assert link.stats.preemptions
    assert all(link.tokens(i) == [SCRIPT[k % 3] for k in range(20)] for i in range(4))


def test_details_come_if_asked_for_one_a_token_and_one_a_prompt_position() -> None:
    asks = request(0, range(1, 9), 3, sampling=SamplingParams(logprobs=2, prompt_logprobs=1))
    link = serve([asks, request(1, [5], 3)], MockExecutor(SCRIPT, vocab_size=13), budget=5)
    details = [detail for output in link.outputs[0] for detail in output.details]
    assert [detail.top_ids for detail in details] == [(11, 12), (12, 0), (0, 1)]
    assert all(detail.logprob == detail.top_logprobs[0] > detail.top_logprobs[1] for detail in details)
    prompt = prompt_details_of(link.outputs[0])
    assert [detail.top_ids for detail in prompt] == [(token_id,) for token_id in range(2, 9)]
    assert not any(output.details or output.payload for output in link.outputs[1])


def test_a_step_takes_its_time_and_steps_do_not_overlap_on_the_device() -> None:
    began = time.monotonic()
    link = serve([request(0, [1], 5)], MockExecutor(SCRIPT, step_s=0.02))
    assert 0.1 <= time.monotonic() - began < 5
    assert link.stats.step_s > 0  # the host's share of a step depends on the load of the machine


def test_faults_are_read_and_nonsense_is_refused_with_the_cure() -> None:
    assert parse_faults(" nan@5, raise@100 ") == (Fault("nan", 5), Fault("raise", 100))
    assert parse_faults("") == ()
    for wrong in ("boom@3", "nan", "nan@0", "nan@-1", "nan@x"):
        with pytest.raises(ArgumentError, match="nan@5"):
            parse_faults(wrong)


def test_a_row_that_is_not_finite_fails_alone() -> None:
    executor = MockExecutor(SCRIPT, faults=parse_faults("nan@2"))
    link = serve([request(0, [1], 3), request(1, [2], 3)], executor)
    assert link.outputs[0][-1].finish_reason == "error"
    assert link.outputs[0][-1].message
    assert link.tokens(1) == [11, 12, 13]


def test_a_raising_step_ends_the_engine() -> None:
    with pytest.raises(RuntimeError, match="step 2"):
        serve([request(0, [1], 9)], MockExecutor(SCRIPT, faults=parse_faults("raise@2")))


def test_an_empty_script_is_refused() -> None:
    with pytest.raises(ArgumentError):
        MockExecutor(())


def test_a_killed_engine_dies_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    monkeypatch.setattr("tokenmill.runtime.mock.os.kill", lambda pid, number: killed.append(number))
    serve([request(0, [1], 3)], MockExecutor(SCRIPT, faults=parse_faults("exit@2")))
    assert killed == [9]
