"""EngineConnection: an HTTP worker's end of the socket to rank 0 of one engine.

Messages of one iteration of the event loop are sent in one frame. When the connection is lost, it is opened again.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from tokenmill.wire.channel import AsyncChannel
from tokenmill.wire.messages import EngineInfo, FromEngine, StepOutputs, ToEngine

_RETRY_S = (0.02, 0.05, 0.1)  # an attempt costs next to nothing


class Events(Protocol):
    """Receiver of what happens on a connection. Called from the event loop; must not block."""

    def connected(self, connection: EngineConnection, info: EngineInfo) -> None:
        """Take the first frame of an engine that has just been connected."""

    def received(self, connection: EngineConnection, message: StepOutputs) -> None:
        """Take the outputs of a step."""

    def lost(self, connection: EngineConnection, error: Exception | None) -> None:
        """Take the end of a connection; None: closed in order. Nothing more comes until `connected`."""


class EngineConnection:
    """Connection to the engine number `index` on the Unix socket `address`. For one event loop; `run` must be running.

    `info`: of the connected engine, None while there is none. `heard`: when its last frame came, monotonic seconds.
    """

    def __init__(self, index: int, address: str, events: Events) -> None:
        self.index = index
        self.info: EngineInfo | None = None
        self.heard = 0.0
        self._address, self._events = address, events
        self._channel: AsyncChannel[FromEngine] | None = None
        self._closed = asyncio.Event()
        self._outbox: list[ToEngine] = []

    def post(self, message: ToEngine) -> None:
        """Send a message at the end of this iteration of the event loop."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(message)

    async def run(self) -> None:
        """Connect, and reconnect whenever the connection is lost. Ends only by cancellation."""
        while True:
            await self._connect()
            await self._closed.wait()

    def close(self) -> None:
        """Close the connection; `lost` follows."""
        if self._channel is not None:
            self._channel.close()

    async def _connect(self) -> None:
        attempt = 0
        while True:
            try:
                self._closed.clear()
                self._channel = await AsyncChannel.open(self._address, FromEngine, self._receive, self._lost)
                return
            except OSError:
                await asyncio.sleep(_RETRY_S[min(attempt, len(_RETRY_S) - 1)])
                attempt += 1

    def _flush(self) -> None:
        messages, self._outbox = self._outbox, []
        if messages and self._channel is not None and self._channel.is_open:
            self._channel.send(messages)  # if it is not open, `lost` is about to be called

    def _receive(self, message: FromEngine) -> None:
        self.heard = time.monotonic()
        if isinstance(message, StepOutputs):
            self._events.received(self, message)
        else:
            self.info = message
            self._events.connected(self, message)

    def _lost(self, error: Exception | None) -> None:
        self._channel, self.info = None, None
        self._outbox.clear()  # what was not sent is of requests that `lost` moves or fails
        self._events.lost(self, error)
        self._closed.set()
