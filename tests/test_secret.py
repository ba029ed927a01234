"""Connections between machines: TCP, and the proof of a shared secret."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from tokenmill.cluster import is_loopback, tcp_address
from tokenmill.errors import AddressInUse, WrongSecret
from tokenmill.wire import secret as proof
from tokenmill.wire.channel import Channel, Listener, connect

SECRET = b"a secret of sixteen bytes or more"


class Node:
    """A listener that answers the first message of the first node that holds the secret."""

    def __init__(self) -> None:
        self.listener = Listener("tcp://127.0.0.1:0", secret=SECRET)
        self.address = tcp_address("127.0.0.1", self.listener._socket.getsockname()[1])
        self.received: list[str | None] = []
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        channel: Channel[str] = Channel(self.listener.accept(), str)
        self.received.append(channel.receive())
        channel.send("welcome")
        channel.close()


@pytest.fixture
def node() -> Iterator[Node]:
    made = Node()
    yield made
    made.thread.join(10)
    made.listener.close()


def talk(address: str) -> str | None:
    channel: Channel[str] = Channel.connect(address, str, secret=SECRET)
    channel.send("hello")
    answer = channel.receive()
    channel.close()
    return answer


def test_nodes_of_one_secret_talk(node: Node) -> None:
    assert talk(node.address) == "welcome"
    assert node.received == ["hello"]


@pytest.mark.parametrize("other", [b"", b"another", SECRET + b"x"])
def test_a_wrong_secret_is_refused_on_both_sides_and_the_next_node_is_served(
    node: Node, other: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(WrongSecret, match="--cluster-secret-file"):
        connect(node.address, secret=other)
    assert talk(node.address) == "welcome"
    assert "was refused: it has another secret" in caplog.text


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"tokenmill cluster 1\n" + bytes(32 + 32), b"x"])
def test_a_stranger_is_dropped_whatever_it_sends(
    node: Node, data: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(proof, "_TIMEOUT_S", 0.3)  # of a stranger that sends too little
    host, port = node.address.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(data)
        while not caplog.records:
            node.thread.join(0.01)
    monkeypatch.undo()
    assert talk(node.address) == "welcome"
    assert "was refused" in caplog.text


def test_a_listener_without_the_secret_is_recognised_by_its_caller() -> None:
    def pretend(server: socket.socket) -> None:
        sock, _ = server.accept()
        with sock:
            sock.recv(100)
            sock.sendall(bytes(64))
            sock.recv(100)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=pretend, args=[server])
        thread.start()
        with pytest.raises(WrongSecret):
            connect(tcp_address("127.0.0.1", server.getsockname()[1]), secret=SECRET)
        thread.join(10)


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(AddressInUse, match=f"Port {port} .*--master-port"):
            Listener(tcp_address("127.0.0.1", port))


def test_a_node_that_does_not_listen_is_an_error_after_the_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = tcp_address("127.0.0.1", server.getsockname()[1])
    with pytest.raises(OSError, match="refused"):
        connect(address, timeout_s=0.0, secret=SECRET)


def test_addresses_that_only_this_machine_reaches() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.1.2.3", "::1")))
    assert not any(map(is_loopback, ("10.0.0.1", "0.0.0.0", "node-0", "::")))
