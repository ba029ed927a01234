"""The steps of a warm-up on a GPU."""

from __future__ import annotations

import pytest
from support_cuda import torch

from tokenmill.backends.base import StepLimits
from tokenmill.backends.cuda.warm_up import warm_up_of

torch.set_num_threads(1)


@pytest.mark.parametrize("slots", [1, 2, 5, 70, 256])
def test_no_step_of_a_warm_up_has_more_rows_than_there_are_slots(slots: int) -> None:
    work = warm_up_of(StepLimits(4096, slots, 4096, 16), 1024, slots, (slots,))
    assert max(work.decodes) == slots
    rows = [len(step[0].slots) for step in work.mixed]
    assert max(rows, default=slots) == slots
