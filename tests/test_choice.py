"""The number of ranks, against the devices and CPUs of the machine."""

from __future__ import annotations

import pytest

from tokenmill.backends.kind import BackendOptions
from tokenmill.config import Settings
from tokenmill.errors import ArgumentError, NotEnoughDevices
from tokenmill.runtime import choice, worker
from tokenmill.runtime.choice import check_ranks
from tokenmill.wire.messages import Place


def test_more_ranks_than_devices_are_refused_with_both_numbers_and_the_cure() -> None:
    with pytest.raises(NotEnoughDevices, match=r"3 ranks need as many devices, but 2 of them are visible.*--num-shard"):
        check_ranks(BackendOptions(local_ranks=3), 2)
    check_ranks(BackendOptions(local_ranks=2), 2)
    check_ranks(BackendOptions(local_ranks=3, share_devices=True), 2)
    assert NotEnoughDevices.variant == "NotEnoughCUDADevices"


def test_more_ranks_than_cpus_are_refused_unless_they_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmill.host.usable_cpus", lambda: 2)
    with pytest.raises(ArgumentError, match="3 ranks on CPUs need one each, but this process may use 2"):
        check_ranks(BackendOptions(local_ranks=3), None)
    check_ranks(BackendOptions(local_ranks=2), None)
    check_ranks(BackendOptions(local_ranks=3, share_devices=True), None)


def test_one_rank_is_never_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmill.host.usable_cpus", lambda: 0)
    check_ranks(BackendOptions(), None)


@pytest.mark.parametrize("device, visible, index, sharers", [(0, 1, 0, 4), (3, 1, 0, 4), (3, 2, 1, 2), (2, 3, 2, 2)])
def test_ranks_that_share_devices_take_them_in_turn(
    device: int, visible: int, index: int, sharers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "num_devices", lambda: visible)
    options = worker.backend_options(Settings(share_devices=True), Place(device, 4))
    assert (options.device_index, options.device_sharers) == (index, sharers)
    options = worker.backend_options(Settings(), Place(device, 4))
    assert (options.device_index, options.device_sharers) == (device, 1)


def test_an_engine_gets_its_part_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "usable_cpus", lambda: 8)
    settings = Settings(data_parallel_size=2, memory_limit="8GiB")
    options = worker.engine_options(settings, Place(1, 4, host_memory=5 << 30))
    assert (options.memory_limit, options.host_memory, options.backend.cpus) == (4 << 30, 5 << 30, 4)


def test_the_devices_are_those_of_the_kind_that_sees_most(monkeypatch: pytest.MonkeyPatch) -> None:
    class Some:
        devices = ("cuda", "cpu")

        def num_devices(self, device: str) -> int | None:
            return {"cuda": 3}.get(device)

    monkeypatch.setattr(choice, "kinds", lambda: [Some()])
    assert choice.num_devices() == 3
    monkeypatch.setattr(choice, "kinds", list)
    assert choice.num_devices() == 0
