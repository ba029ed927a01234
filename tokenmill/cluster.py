"""Several machines that serve one engine: their checks, their shared secret, and the ports at which they meet.

Node 0 listens, on `--master-addr`: at `--master-port` for the group of ranks, at the next port for the messages of
steps, and at one more port for each other node.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import NamedTuple

from tokenmill.errors import ArgumentError

ADDRESS, PORT = "localhost", 29500
"""Defaults of `--master-addr` and `--master-port`, TGI's"""
SCHEME = "tcp://"
"""Beginning of addresses between machines"""
_LEAST_SECRET = 16  # bytes


class Nodes(NamedTuple):
    """The machines of an engine: this one is number `rank` of `size`. `address`, `port`: of node 0."""

    size: int = 1
    rank: int = 0
    address: str = ADDRESS
    port: int = PORT
    secret_file: str = ""

    def local_ranks(self, ranks: int) -> range:
        """Return the ranks that run on this machine, of so many."""
        each = ranks // self.size
        return range(self.rank * each, self.rank * each + each)

    def group_address(self) -> str:
        """Return the address at which the group of ranks meets."""
        return self._at(self.port)

    def steps_address(self) -> str:
        """Return the address at which rank 0 hands out the messages of steps."""
        return self._at(self.port + 1)

    def node_address(self, node: int) -> str:
        """Return the address at which node 0 waits for another one."""
        return self._at(self.port + 1 + node)

    def secret(self) -> bytes:
        """Return the secret of the cluster; b"" without a file. Raise ArgumentError if it cannot be read."""
        if not self.secret_file:
            return b""
        try:
            secret = Path(self.secret_file).read_bytes().strip()
        except OSError as error:
            raise ArgumentError(f"`cluster_secret_file` {self.secret_file}: {error.strerror}.") from None
        if len(secret) < _LEAST_SECRET:
            raise ArgumentError(
                f"`cluster_secret_file` {self.secret_file} holds {len(secret)} bytes; a secret has at least "
                f"{_LEAST_SECRET}. Write one with: openssl rand -hex 32 > {self.secret_file}"
            )
        return secret

    def _at(self, port: int) -> str:
        return tcp_address(self.address, port)


def check_nodes(nodes: Nodes, ranks: int, engines: int) -> list[str]:
    """Return warnings of options without effect.

    Raise ArgumentError, with the cure, unless `ranks` of one engine can be divided among the nodes.
    """
    if nodes.rank >= nodes.size:
        raise ArgumentError(
            f"`node_rank` is {nodes.rank}, but there are {nodes.size} nodes: numbers begin with 0. Give the number of "
            "nodes as --num-nodes."
        )
    if nodes.size == 1:
        given = {"addr": nodes.address != ADDRESS, "port": nodes.port != PORT}
        why = "ranks of one machine meet in a private folder; it is for --num-nodes."
        return [f"`--master-{name}` has no effect: {why}" for name, was_given in given.items() if was_given]
    if ranks % nodes.size:
        raise ArgumentError(
            f"{ranks} ranks (--num-shard times --pipeline-parallel-size) cannot be divided among {nodes.size} nodes "
            "(--num-nodes). Give a multiple of it."
        )
    if engines > 1:
        raise ArgumentError(
            "`data_parallel_size` is for the engines of one machine. With several nodes, start a server for each group "
            "of them, and put a load balancer or `tokenmill deploy` in front."
        )
    if not nodes.secret_file and not is_loopback(nodes.address):
        raise ArgumentError(
            f"With --num-nodes {nodes.size}, ports of {nodes.address} are open to the network, so nodes need a shared "
            "secret: give each the same --cluster-secret-file (openssl rand -hex 32 > FILE)."
        )
    nodes.secret()
    return []


def tcp_address(host: str, port: int) -> str:
    """Return the address of a port of a host: "tcp://host:port", with an IPv6 host in brackets."""
    return f"{SCHEME}[{host}]:{port}" if ":" in host else f"{SCHEME}{host}:{port}"


def is_loopback(host: str) -> bool:
    """Return True if a host's name or address is reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
