"""Machines of an engine: how ranks are divided among them, their ports, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenmill.cluster import Nodes, check_nodes
from tokenmill.errors import ArgumentError


def test_consecutive_ranks_are_on_one_machine() -> None:
    assert [list(Nodes(2, node).local_ranks(4)) for node in range(2)] == [[0, 1], [2, 3]]
    assert list(Nodes().local_ranks(3)) == [0, 1, 2]


def test_each_meeting_has_a_port_of_its_own() -> None:
    nodes = Nodes(3, 0, "10.0.0.1", 29500)
    places = [nodes.group_address(), nodes.steps_address(), nodes.node_address(1), nodes.node_address(2)]
    assert places == [f"tcp://10.0.0.1:{port}" for port in (29500, 29501, 29502, 29503)]
    assert Nodes(2, 0, "fd00::1", 29500).group_address() == "tcp://[fd00::1]:29500"


@pytest.mark.parametrize(
    ("nodes", "ranks", "engines", "told"),
    [
        (Nodes(2, 2, "127.0.0.1"), 2, 1, "`node_rank` is 2, but there are 2 nodes"),
        (Nodes(1, 1), 1, 1, "--num-nodes"),
        (Nodes(2, 0, "127.0.0.1"), 3, 1, "3 ranks .* cannot be divided among 2 nodes"),
        (Nodes(2, 0, "127.0.0.1"), 1, 1, "1 ranks .* cannot be divided among 2 nodes"),
        (Nodes(2, 0, "127.0.0.1"), 2, 2, "`data_parallel_size`"),
        (Nodes(2, 0, "10.0.0.1"), 2, 1, "--cluster-secret-file"),
        (Nodes(2, 0, "node-0"), 2, 1, "--cluster-secret-file"),
        (Nodes(2, 0, "0.0.0.0"), 2, 1, "--cluster-secret-file"),
        (Nodes(2, 0, "10.0.0.1", 29500, "/nowhere/secret"), 2, 1, "/nowhere/secret: No such file"),
    ],
)
def test_nodes_that_cannot_serve_are_refused_with_the_cure(nodes: Nodes, ranks: int, engines: int, told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        check_nodes(nodes, ranks, engines)


@pytest.mark.parametrize("nodes", [Nodes(), Nodes(2, 1, "127.0.0.1"), Nodes(2, 1, "localhost"), Nodes(4, 3, "::1")])
def test_loopback_needs_no_secret(nodes: Nodes) -> None:
    check_nodes(nodes, 4, 1)


def test_a_secret_has_sixteen_bytes_without_the_white_space_around_it(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    nodes = Nodes(2, 0, "10.0.0.1", 29500, str(file))
    file.write_bytes(b"0123456789abcdef\n")
    check_nodes(nodes, 2, 1)
    assert nodes.secret() == b"0123456789abcdef"
    file.write_bytes(b"0123456789abcde\n\n")
    with pytest.raises(ArgumentError, match=r"holds 15 bytes.*openssl rand"):
        check_nodes(nodes, 2, 1)
