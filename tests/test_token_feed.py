"""Sampled tokens reach the first step that computes them, and none reaches another."""

from __future__ import annotations

from typing import Any

import numpy as np

from tokenmill.backends.base import Admitted, StepInputs
from tokenmill.runtime.token_feed import TokenFeed
from tokenmill.wire.messages import Request, SamplingParams, StoppingParams


class Device:
    """Backend that records the host tokens of the steps that run, in order."""

    def __init__(self) -> None:
        self.ran: list[list[list[int]]] = []
        self.feed = TokenFeed(self.run)

    def run(self, inputs: StepInputs) -> Any:
        self.ran.append(inputs.host_tokens.tolist())
        return object()

    def launch(
        self,
        rows: list[tuple[int, int, int]],
        admitted: tuple[int, ...] = (),
        host: list[tuple[int, int, int]] | None = None,
    ) -> Any:
        """Launch a step of rows (slot, start, count), which all sample."""
        slots, starts, counts = (np.array(column, np.int32) for column in zip(*rows, strict=True))
        request = Request(0, (1,), SamplingParams(), StoppingParams(1))
        new = tuple(Admitted(slot, request, np.zeros(1, np.int32)) for slot in admitted)
        tokens = np.array(host or [], np.int32).reshape(-1, 3)
        samples = np.arange(len(rows), dtype=np.int32)
        return self.feed.launch(StepInputs(slots, starts, counts, samples, new, host_tokens=tokens))


def test_a_step_waits_for_its_tokens_and_holds_those_behind_it() -> None:
    device = Device()
    first = device.launch([(0, 0, 5), (1, 0, 3)], (0, 1))
    second = device.launch([(2, 0, 4)], (2,))
    third = device.launch([(0, 5, 1), (1, 3, 1)])
    fourth = device.launch([(3, 0, 2)], (3,))
    assert (len(device.ran), third.step, fourth.step) == (2, None, None)
    device.feed.arrive(second, [9])
    assert third.step is None
    device.feed.arrive(first, [7, 8])
    assert device.ran == [[], [], [[0, 5, 7], [1, 3, 8]], []]
    assert third.step is not None
    assert fourth.step is not None


def test_a_token_that_has_arrived_is_sent_with_the_step_that_computes_it() -> None:
    device = Device()
    first = device.launch([(0, 0, 5)], (0,))
    device.feed.arrive(first, [7])
    device.launch([(1, 0, 2)], (1,))
    device.launch([(0, 5, 1)])
    device.launch([(0, 5, 1)])  # once more: its sampled token was voided
    assert device.ran == [[], [], [[0, 5, 7]], []]


def test_tokens_that_are_appended_behind_an_arrived_one_leave_it() -> None:
    device = Device()
    device.feed.arrive(device.launch([(0, 0, 5)], (0,)), [7])
    device.launch([(0, 5, 3)], host=[(0, 6, 20), (0, 7, 21)])
    assert device.ran[-1] == [[0, 6, 20], [0, 7, 21], [0, 5, 7]]


def test_a_token_that_was_replaced_is_not_sent_and_not_waited_for() -> None:
    device = Device()
    first = device.launch([(0, 0, 5)], (0,))
    second = device.launch([(0, 5, 2)], host=[(0, 5, 20), (0, 6, 21)])
    assert second.step is not None
    device.feed.arrive(first, [7])
    assert device.ran == [[], [[0, 5, 20], [0, 6, 21]]]


def test_a_slot_that_is_taken_again_drops_the_token_of_its_sequence_before() -> None:
    device = Device()
    first = device.launch([(0, 0, 5)], (0,))
    second = device.launch([(0, 0, 8)], (0,))
    assert second.step is not None
    device.feed.arrive(first, [7])
    assert device.ran == [[], []]


def test_a_row_without_finite_logits_feeds_an_id_that_exists() -> None:
    device = Device()
    first = device.launch([(0, 0, 5)], (0,))
    device.launch([(0, 5, 1)])
    device.feed.arrive(first, [-1])
    assert device.ran[-1] == [[0, 5, 0]]
