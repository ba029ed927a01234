"""TCP sockets between the machines of a cluster, at addresses as `cluster.tcp_address` makes them."""

from __future__ import annotations

import errno
import os
import socket
import time

from tokenmill.cluster import SCHEME
from tokenmill.errors import AddressInUse, ArgumentError

SILENT_S = 4
"""Seconds after which the connection to a machine that does not answer is broken."""

_RETRY_S = 0.2


def is_tcp(address: str) -> bool:
    """Return True for an address of this module, False for a path."""
    return address.startswith(SCHEME)


def listening(address: str) -> socket.socket:
    """Return a socket that is bound to an address. Raise AddressInUse or ArgumentError, with the cure."""
    host, port = _split(address)
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise ArgumentError(f"The host of {address} is not known: {error.strerror}.") from None
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(place)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(f"Port {port} of {host} is taken. Give all nodes another --master-port.") from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise ArgumentError(
                f"{host} is no address of this machine. --master-addr is the address of node 0."
            ) from None
        raise
    return sock


def connected(address: str, timeout_s: float) -> socket.socket:
    """Return a blocking socket that is connected to an address, tried for `timeout_s` seconds. Raises OSError."""
    host, port = _split(address)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return tuned(socket.create_connection((host, port), max(1.0, min(5.0, timeout_s))))
        except OSError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_RETRY_S)


def tuned(sock: socket.socket) -> socket.socket:
    """Make a connection blocking, without delays, and broken soon after its peer's machine is gone. Return it."""
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": SILENT_S - 1, "TCP_USER_TIMEOUT": 1000 * SILENT_S}
    for name, value in options.items():
        if hasattr(socket, name) and os.name == "posix":
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return sock


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix(SCHEME).rpartition(":")
    return host.strip("[]"), int(port)
