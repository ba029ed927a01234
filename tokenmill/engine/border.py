"""Rank 0's sockets to the HTTP workers: receive requests, and send each worker one frame per step.

There is no thread: sockets are polled once per step, and waited for only while the engine is idle.

Invariant: no HTTP worker can stop the engine. A worker that sends invalid frames or does not read is disconnected, and
its requests are aborted.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress

import msgspec

from tokenmill.wire.channel import ChannelError, FrameReader, Listener, frame
from tokenmill.wire.messages import Abort, EngineInfo, Output, Request, Stats, StepOutputs, ToEngine

HEARTBEAT_S = 1.0
"""Seconds after which a worker without outputs gets an empty frame."""

MAX_UNREAD_BYTES = 16 << 20
"""Unread bytes at which an HTTP worker is disconnected: minutes of tokens."""

_READ_BYTES = 1 << 20

_log = logging.getLogger(__name__)


class _Waker:
    """Pipe that makes a selector return. `wake` may be called from any thread, also after `close`."""

    def __init__(self) -> None:
        self._closing = threading.Lock()  # never write to a closed descriptor: its number may have been reused
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)

    def fileno(self) -> int:
        return self._read

    def wake(self) -> None:
        with self._closing, suppress(OSError):  # full: the selector returns anyway; closed: there is no wait to end
            os.write(self._write, b"\0")

    def drain(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._read, 4096)

    def close(self) -> None:
        with self._closing:
            if self._read >= 0:
                os.close(self._read)
                os.close(self._write)
                self._read = self._write = -1


class _Worker:
    """A connected HTTP worker, with its unsent bytes and its unfinished requests."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.reader: FrameReader[list[ToEngine]] = FrameReader(list[ToEngine])
        self.unsent = bytearray()
        self.requests: set[int] = set()
        self.last_sent = 0.0

    def flush(self) -> None:
        """Write as much as the socket takes, without blocking. Raise OSError if the connection is broken."""
        while self.unsent:
            try:
                sent = self.socket.send(self.unsent)
            except (BlockingIOError, InterruptedError):
                return
            del self.unsent[:sent]


class Border:
    """The outermost link of rank 0: a `gated.Source` on the Unix socket `address`.

    `info`: the first frame of every connection. `watch`: a file descriptor that ends a wait when it becomes readable;
    the caller reads it. `heartbeat_s`: seconds without outputs after which a worker gets an empty frame.
    `max_unread_bytes`: unread bytes at which a worker is disconnected.
    """

    def __init__(
        self,
        address: str,
        info: EngineInfo,
        *,
        watch: int | None = None,
        heartbeat_s: float = HEARTBEAT_S,
        max_unread_bytes: int = MAX_UNREAD_BYTES,
    ) -> None:
        self._info = info
        self._heartbeat_s, self._max_unread_bytes = heartbeat_s, max_unread_bytes
        self._encoder = msgspec.msgpack.Encoder()
        self._workers: set[_Worker] = set()
        self._owner_of: dict[int, _Worker] = {}
        self._woken = False  # `watch` was readable at the last poll, or `wake` was called
        self._aborts: list[ToEngine] = []  # aborts for requests of disconnected workers
        self._listener = Listener(address)
        self._listener.set_blocking(False)
        self._waker = _Waker()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._waker, selectors.EVENT_READ)
        if watch is not None:
            self._selector.register(watch, selectors.EVENT_READ)

    def receive(self, block: bool, plan: bytes = b"") -> list[ToEngine]:
        """See `engine.Link`. A wait ends at the first message, at the next heartbeat, or through `watch` or `wake`."""
        messages = self._read(0.0)
        deadline = time.monotonic() + self._heartbeat_s
        while block and not messages and not self._woken and (left := deadline - time.monotonic()) > 0:
            messages = self._read(left)
        return messages

    def wake(self) -> None:
        """See `gated.Source`."""
        self._waker.wake()

    def send(self, outputs: list[Output], stats: Stats) -> None:
        """See `engine.Link`. Send a frame to each worker that has outputs or whose heartbeat is due."""
        now = time.monotonic()
        for worker, own in self._by_worker(outputs):
            self._send(worker, StepOutputs(tuple(own), stats), now)
        for worker in [worker for worker in self._workers if now - worker.last_sent >= self._heartbeat_s]:
            self._send(worker, StepOutputs((), stats), now)

    def close(self) -> None:
        """Close every connection and stop listening. Idempotent."""
        for worker in list(self._workers):
            self._drop(worker, "")
        self._listener.close()
        self._selector.close()
        self._waker.close()

    def _read(self, timeout_s: float) -> list[ToEngine]:
        self._woken = False
        messages: list[ToEngine] = []
        for key, events in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                self._accept()
            elif key.data is None:
                self._woken = True
                if key.fileobj is self._waker:
                    self._waker.drain()
            else:
                if events & selectors.EVENT_WRITE:
                    self._flush(key.data)
                if events & selectors.EVENT_READ:
                    self._read_worker(key.data, messages)
        if self._aborts:
            messages += self._aborts
            self._aborts = []
        return messages

    def _accept(self) -> None:
        try:
            worker = _Worker(self._listener.accept())
        except OSError as error:  # already disconnected, or no file descriptor is free
            _log.warning("A connection could not be accepted: %s", error)
            return
        self._workers.add(worker)
        self._selector.register(worker.socket, selectors.EVENT_READ, worker)
        self._send(worker, self._info, time.monotonic())

    def _read_worker(self, worker: _Worker, messages: list[ToEngine]) -> None:
        if worker not in self._workers:  # disconnected by the write before
            return
        try:
            data = worker.socket.recv(_READ_BYTES)
            if not data:
                self._drop(worker, "")
                return
            for batch in worker.reader.feed(data):
                for message in batch:
                    self._route(worker, message, messages)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._drop(worker, "")
        except ChannelError as error:
            self._drop(worker, str(error))

    def _route(self, worker: _Worker, message: ToEngine, messages: list[ToEngine]) -> None:
        owner = self._owner_of.get(message.id)
        if isinstance(message, Request):
            if owner is not None:
                raise ChannelError(f"request {message.id} is sent twice")
            self._owner_of[message.id] = worker
            worker.requests.add(message.id)
        elif owner is worker:
            self._forget(message.id)
        else:
            return  # the request has ended in the meantime
        messages.append(message)

    def _by_worker(self, outputs: list[Output]) -> Iterable[tuple[_Worker, list[Output]]]:
        """Divide `outputs` among the workers, keeping the order, and drop the state of requests that end."""
        if not outputs:
            return ()
        parts: dict[_Worker, list[Output]] = {}
        owner_of = self._owner_of
        if len(self._workers) == 1:
            (worker,) = self._workers
            parts[worker] = [output for output in outputs if output.request_id in owner_of]
        else:
            for output in outputs:
                owner = owner_of.get(output.request_id)
                if owner is not None:
                    parts.setdefault(owner, []).append(output)
        for output in outputs:
            if output.finish_reason:
                self._forget(output.request_id)
        return parts.items()

    def _forget(self, request_id: int) -> None:
        owner = self._owner_of.pop(request_id, None)
        if owner is not None:
            owner.requests.discard(request_id)

    def _send(self, worker: _Worker, message: EngineInfo | StepOutputs, now: float) -> None:
        if worker not in self._workers:
            return
        worker.last_sent = now
        worker.unsent += frame(self._encoder, message)
        self._flush(worker)

    def _flush(self, worker: _Worker) -> None:
        try:
            worker.flush()
        except OSError:
            self._drop(worker, "")
            return
        if len(worker.unsent) > self._max_unread_bytes:
            self._drop(worker, f"it left {len(worker.unsent)} bytes unread")
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.unsent else 0)
        if self._selector.get_key(worker.socket).events != wanted:
            self._selector.modify(worker.socket, wanted, worker)

    def _drop(self, worker: _Worker, fault: str) -> None:
        """Disconnect a worker; the next `receive` aborts its requests. `fault`: the fault to log, "" for none."""
        if worker not in self._workers:
            return
        if fault:
            _log.error("The connection of an HTTP worker is closed: %s.", fault)
        self._workers.discard(worker)
        self._selector.unregister(worker.socket)
        worker.socket.close()
        for request_id in sorted(worker.requests):
            self._owner_of.pop(request_id, None)
            self._aborts.append(Abort(request_id))
        worker.requests.clear()
