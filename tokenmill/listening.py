"""Open the listening socket on an address or host name, and format both."""

from __future__ import annotations

import errno
import socket
from typing import Any

from tokenmill.errors import AddressInUse


def listen(hostname: str, port: int) -> socket.socket:
    """Listen on an address, or on the first address of a host name that this machine has, IPv4 first.

    Raises AddressInUse with the remedy.
    """
    try:
        found = socket.getaddrinfo(hostname, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise AddressInUse(
            f"Cannot listen on {hostname!r}: it is neither an address nor a name that is known here ({error}). Give an "
            "address of this machine with --hostname; 0.0.0.0 means all of them."
        ) from None
    failures: list[OSError] = []
    for family, _, _, _, address in sorted(found, key=lambda entry: entry[0] != socket.AF_INET):
        try:
            return _listener(family, address)
        except OSError as error:
            failures.append(error)
    raise AddressInUse(_cannot_listen(place(hostname, port), failures[0]))


def _listener(family: int, address: tuple[Any, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError:
        listener.close()
        raise
    return listener


def _cannot_listen(where: str, error: OSError) -> str:
    host, _, port = where.rpartition(":")
    if error.errno == errno.EADDRINUSE:
        return (
            f"Port {port} of {host} is in use by another process. Give another with --port (or PORT), or stop the one "
            "that listens there."
        )
    cures = {errno.EACCES: "ports below 1024 need root", errno.EADDRNOTAVAIL: "this machine has no such address"}
    cure = cures.get(error.errno or 0, "give another with --hostname and --port")
    return f"Cannot listen on {where}: {error.strerror}; {cure}."


def place(hostname: str, port: int) -> str:
    """Format host and port as in a URL, with an IPv6 address in brackets."""
    return f"[{hostname.replace('%', '%25')}]:{port}" if ":" in hostname else f"{hostname}:{port}"
