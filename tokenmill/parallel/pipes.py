"""Values on their way from one stage of a model to the next, through sockets. No torch."""

from __future__ import annotations

import tempfile
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from socket import SHUT_RDWR, socket

from tokenmill.cluster import tcp_address
from tokenmill.parallel.mesh import Mesh
from tokenmill.wire.channel import Listener, connect

_CONNECT_S = 5.0  # to another machine
_MOST_SENDING = 64
"""Values that are sent ahead of the next stage, which holds up a stage that is faster."""


class Pipes:
    """Connections of a rank to the same tensor rank of the stages before and after its own.

    Invariant: a stage receives its values in the order in which the one before sends them, each of them whole. The
    constructor blocks until all ranks have called it.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._stage = mesh.stage
        self._after: socket | None = None
        self._before: socket | None = None
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="stages")
        self._sending: deque[Future[None]] = deque()
        world = mesh.world
        with tempfile.TemporaryDirectory(prefix="stage-") as folder:
            place = tcp_address(world.host, 0) if world.host else str(Path(folder) / "socket")
            listener = Listener(place, secret=world.secret) if mesh.stage else None
            try:
                addresses = world.exchange(b"" if listener is None else listener.address.encode())
                if mesh.stage < mesh.num_stages - 1:
                    self._after = connect(
                        addresses[mesh.neighbour(1)].decode(), timeout_s=_CONNECT_S, secret=world.secret
                    )
                if listener is not None:
                    self._before = listener.accept()
                world.exchange()  # all are connected
            finally:
                if listener is not None:
                    listener.close()

    def send(self, value: bytes) -> None:
        """Send a value to the next stage. Blocks only while that one lags far behind."""
        assert self._after is not None
        while self._sending and (self._sending[0].done() or len(self._sending) >= _MOST_SENDING):
            self._sending.popleft().result()
        self._sending.append(self._sender.submit(self._after.sendall, value))

    def receive(self, into: memoryview) -> None:
        """Fill `into`, which is contiguous, with the next value of the stage before. Blocks until it has arrived.

        Raise ConnectionError if that stage has ended.
        """
        assert self._before is not None
        left = into.cast("B")
        while left:
            count = self._before.recv_into(left)
            if not count:
                raise ConnectionError(f"stage {self._stage - 1} has ended")
            left = left[count:]

    def close(self) -> None:
        """Close the connections. Values that the next stage has not taken yet may be lost. Idempotent."""
        self._sender.shutdown(wait=False, cancel_futures=True)
        for connection in (self._before, self._after):
            if connection is not None:
                with suppress(OSError):
                    connection.shutdown(SHUT_RDWR)  # ends a call of another thread that waits
                connection.close()
