"""Values between stages: in order, whole, ahead of a slow stage; the end of a stage is told."""

from __future__ import annotations

import socket
import threading
import time

import numpy as np
import pytest
from support_meeting import Meeting, Rank
from support_ranks import run_threads

from tokenmill.parallel.mesh import Mesh
from tokenmill.parallel.pipes import Pipes


def pipes_of(num_stages: int, tensor: int = 1, host: str = "") -> list[Pipes]:
    """Return the pipes of all ranks, made at the same time on threads. `host`: of ranks on several machines."""
    meeting, made = Meeting(num_stages * tensor), dict[int, Pipes]()

    def make(rank: int) -> None:
        world = Rank(rank, meeting)
        world.host, world.secret = host, b"0123456789abcdef" if host else b""
        made[rank] = Pipes(Mesh.of(world, num_stages))

    run_threads(make, meeting.size)
    return [made[rank] for rank in range(meeting.size)]


def received(pipes: Pipes, size: int) -> bytes:
    value = np.empty(size, np.uint8)
    pipes.receive(value.data)
    return value.tobytes()


def test_values_arrive_whole_and_in_order_at_the_same_tensor_rank_of_the_next_stage() -> None:
    pipes = pipes_of(3, 2)
    values = [np.random.default_rng(i).bytes(n) for i, n in enumerate((1, 3_000_000, 7))]
    for tensor in range(2):
        for value in values:  # a slow stage does not hold up the one before
            pipes[tensor].send(value)
        for value in values:
            assert received(pipes[2 + tensor], len(value)) == value
            pipes[2 + tensor].send(value[:1])
        assert [received(pipes[4 + tensor], 1) for _ in values] == [value[:1] for value in values]
    for each in pipes:
        each.close()
        each.close()


def test_a_stage_that_has_ended_is_named() -> None:
    first, second = pipes_of(2)
    first.close()
    with pytest.raises(ConnectionError, match="stage 0 has ended"):
        received(second, 4)
    second.close()


def test_closing_ends_a_wait_for_a_value() -> None:
    first, second = pipes_of(2)
    ended = threading.Event()

    def wait() -> None:
        with pytest.raises((OSError, ConnectionError)):
            received(second, 4)
        ended.set()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    time.sleep(0.05)  # until it waits
    second.close()
    assert ended.wait(10)
    first.close()


def test_stages_on_several_machines_are_connected_by_tcp() -> None:
    first, second = pipes_of(2, host="127.0.0.1")
    assert first._after is not None
    assert first._after.family == socket.AF_INET
    first.send(b"value")
    assert received(second, 5) == b"value"
    first.close()
    second.close()
