"""Proof that both ends of a connection between machines hold the same secret, before anything else is read from it.

Challenge and response with HMAC-SHA256, in both directions; the secret itself is not sent. What follows is neither
encrypted nor signed: it needs a network that strangers cannot write to.
"""

from __future__ import annotations

import hmac
import secrets
import socket

from tokenmill.errors import WrongSecret

_HELLO = b"tokenmill cluster 1\n"
_NONCE_BYTES = _MAC_BYTES = 32
_TIMEOUT_S = 5.0
_WELCOME = b"\x01"


def prove_as_listener(sock: socket.socket, secret: bytes) -> None:
    """Prove and check the secret on an accepted connection.

    Raise WrongSecret or OSError: the peer is a stranger, or does not answer within some seconds.
    """
    before = sock.gettimeout()
    sock.settimeout(_TIMEOUT_S)
    if _read(sock, len(_HELLO)) != _HELLO:
        raise WrongSecret("it is no node of a tokenmill cluster")
    theirs, ours = _read(sock, _NONCE_BYTES), secrets.token_bytes(_NONCE_BYTES)
    sock.sendall(ours + _mac(secret, b"listener", theirs, ours))
    if not hmac.compare_digest(_read(sock, _MAC_BYTES), _mac(secret, b"caller", ours, theirs)):
        raise WrongSecret("it has another secret; give every node the same --cluster-secret-file")
    sock.sendall(_WELCOME)
    sock.settimeout(before)


def prove_as_caller(sock: socket.socket, secret: bytes, address: str) -> None:
    """Prove and check the secret on a connection to `address`. Raise WrongSecret or OSError."""
    before = sock.gettimeout()
    sock.settimeout(_TIMEOUT_S)
    ours = secrets.token_bytes(_NONCE_BYTES)
    sock.sendall(_HELLO + ours)
    theirs = _read(sock, _NONCE_BYTES)
    proof = _read(sock, _MAC_BYTES)
    sock.sendall(_mac(secret, b"caller", theirs, ours))  # even after a wrong one: the listener's log tells why, too
    if not hmac.compare_digest(proof, _mac(secret, b"listener", ours, theirs)):
        raise WrongSecret(f"{address} has another secret. Give every node the same --cluster-secret-file.")
    _read(sock, len(_WELCOME))
    sock.settimeout(before)


def _mac(secret: bytes, role: bytes, first: bytes, second: bytes) -> bytes:
    return hmac.digest(secret, role + b"\n" + first + second, "sha256")


def _read(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise ConnectionError("the connection was closed before the secret was proved")
        data += more
    return data
