"""Where an engine's messages come from and its outputs go.

Rank 0 has an `Intake`: it listens for HTTP workers, reads their requests, writes each a frame a step, and hands every
step's messages on to the other ranks, which have a `Follower` each. No thread: sockets are looked at once a step, and
waited for only when the engine is idle. Nothing an HTTP worker does or fails to do stops the engine: one that sends
nonsense, or does not read, is cut off, and its requests are aborted.
"""

from __future__ import annotations

import logging
import selectors
import socket
import time
from collections.abc import Iterable
from typing import Protocol

import msgspec

from tokenmill.wire.channel import Channel, ChannelError, FrameReader, Listener, frame
from tokenmill.wire.messages import Abort, EngineInfo, Output, Request, Stats, StepOutputs, ToEngine, ToScheduler

HEARTBEAT_S = 1.0
"""How long an engine is silent at most, if no step takes longer."""

MAX_UNREAD_BYTES = 16 << 20
"""What an HTTP worker may leave unread before it is cut off: minutes of tokens."""

_READ_BYTES = 1 << 20
_JOIN_S = 600.0

_log = logging.getLogger(__name__)


class RanksDiverged(RuntimeError):
    """Two ranks planned different steps. A bug; the engine must be started anew."""


class FollowerFrame(msgspec.Struct, frozen=True, array_like=True):
    """What rank 0 sends the others before each step."""

    messages: tuple[ToScheduler, ...]
    plan: bytes = b""  # digest of the plan before; b"": not compared


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """The first frame of a follower."""

    rank: int


class Gate(Protocol):
    """Stands between rank 0's border and the schedulers: requests may wait there, and messages of its own come in."""

    def fileno(self) -> int:
        """Readable when a request that waits may go on."""

    def take(self, messages: list[ToEngine]) -> list[ToScheduler]:
        """What the schedulers get of these, of what waits, and of its own. Called once a turn, at least."""

    def tell(self, outputs: list[Output]) -> list[Output]:
        """The outputs of a turn, behind its own."""


class _Worker:
    """A connected HTTP worker: what it has sent and not read, and the requests it waits for."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.reader: FrameReader[list[ToEngine]] = FrameReader(list[ToEngine])
        self.unsent = bytearray()
        self.requests: set[int] = set()
        self.last_sent = 0.0

    def flush(self) -> None:
        """Write what the socket takes. Raises OSError if the worker is gone."""
        while self.unsent:
            try:
                sent = self.socket.send(self.unsent)
            except (BlockingIOError, InterruptedError):
                return
            del self.unsent[:sent]


class Intake:
    """Rank 0's link. `address` is the Unix socket to listen on; `info` is the first frame of every connection.

    `watch` is a file descriptor that ends a wait when it becomes readable; reading it is the caller's business. The
    `gate` stays the caller's to close.
    """

    def __init__(
        self,
        address: str,
        info: EngineInfo,
        *,
        ranks: RankServer | None = None,
        gate: Gate | None = None,
        watch: int | None = None,
        heartbeat_s: float = HEARTBEAT_S,
        max_unread_bytes: int = MAX_UNREAD_BYTES,
    ) -> None:
        self._info, self._ranks, self._gate, self._watch = info, ranks, gate, watch
        self._heartbeat_s, self._max_unread_bytes = heartbeat_s, max_unread_bytes
        self._encoder = msgspec.msgpack.Encoder()
        self._workers: set[_Worker] = set()
        self._owner_of: dict[int, _Worker] = {}
        self._watched = False  # `watch` was readable at the last look
        self._orphans: list[ToEngine] = []  # aborts of the requests of workers that are gone
        self._listener = Listener(address)
        self._listener.set_blocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        for waker in (watch, gate):
            if waker is not None:
                self._selector.register(waker, selectors.EVENT_READ)

    def receive(self, block: bool, plan: bytes = b"") -> list[ToScheduler]:
        """See `engine.Link`. What it returns has been handed to the followers."""
        messages = self._admit(self._read(0.0))
        if block and not messages:
            messages = self._wait()
        if self._ranks is not None:
            self._ranks.broadcast(FollowerFrame(tuple(messages), plan))
        return messages

    def send(self, outputs: list[Output], stats: Stats) -> None:
        """See `engine.Link`. One frame for each worker that has outputs or was not told anything for a heartbeat."""
        now = time.monotonic()
        if self._gate is not None:
            outputs = self._gate.tell(outputs)
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
        if self._ranks is not None:
            self._ranks.close()

    def _admit(self, messages: list[ToEngine]) -> list[ToScheduler]:
        return list(messages) if self._gate is None else self._gate.take(messages)

    def _wait(self) -> list[ToScheduler]:
        """The messages of the first worker that says something; none if a heartbeat is due or `watch` comes first."""
        deadline = time.monotonic() + self._heartbeat_s
        while (left := deadline - time.monotonic()) > 0:
            if messages := self._admit(self._read(left)):
                return messages
            if self._watched:
                break
        return []

    def _read(self, timeout_s: float) -> list[ToEngine]:
        self._watched = False
        messages: list[ToEngine] = []
        for key, events in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                self._accept()
            elif key.data is None:
                self._watched = True
            else:
                if events & selectors.EVENT_WRITE:
                    self._flush(key.data)
                if events & selectors.EVENT_READ:
                    self._read_worker(key.data, messages)
        if self._orphans:
            messages += self._orphans
            self._orphans = []
        return messages

    def _accept(self) -> None:
        try:
            worker = _Worker(self._listener.accept())
        except OSError as error:  # gone again, or no file descriptor is left
            _log.warning("A connection could not be accepted: %s", error)
            return
        self._workers.add(worker)
        self._selector.register(worker.socket, selectors.EVENT_READ, worker)
        self._send(worker, self._info, time.monotonic())

    def _read_worker(self, worker: _Worker, messages: list[ToEngine]) -> None:
        if worker not in self._workers:  # dropped by the write before
            return
        try:
            data = worker.socket.recv(_READ_BYTES)
            if not data:
                self._drop(worker, "")
                return
            for batch in worker.reader.feed(data):
                for message in batch:
                    self._take(worker, message, messages)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._drop(worker, "")
        except ChannelError as error:
            self._drop(worker, str(error))

    def _take(self, worker: _Worker, message: ToEngine, messages: list[ToEngine]) -> None:
        owner = self._owner_of.get(message.id)
        if isinstance(message, Request):
            if owner is not None:
                raise ChannelError(f"request {message.id} is sent twice")
            self._owner_of[message.id] = worker
            worker.requests.add(message.id)
        elif owner is worker:
            self._forget(message.id)
        else:
            return  # it has ended in the meantime
        messages.append(message)

    def _by_worker(self, outputs: list[Output]) -> Iterable[tuple[_Worker, list[Output]]]:
        """Each worker's part of `outputs`, in order; requests that end here are forgotten."""
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

    def _drop(self, worker: _Worker, why: str) -> None:
        """Close a worker's connection; its requests are aborted by the next `receive`. `why`: what it did wrong."""
        if worker not in self._workers:
            return
        if why:
            _log.error("The connection of an HTTP worker is closed: %s.", why)
        self._workers.discard(worker)
        self._selector.unregister(worker.socket)
        worker.socket.close()
        for request_id in sorted(worker.requests):
            self._owner_of.pop(request_id, None)
            self._orphans.append(Abort(request_id))
        worker.requests.clear()


class RankServer:
    """Rank 0's connections to the other ranks. If one dies, `broadcast` raises OSError: the engine must end."""

    def __init__(self, address: str, size: int) -> None:
        self._listener = Listener(address)
        self._size = size
        self._followers: dict[int, Channel[Hello]] = {}
        self._encoder = msgspec.msgpack.Encoder()

    def wait(self, timeout_s: float = _JOIN_S) -> None:
        """Wait until every other rank has connected. Raises TimeoutError naming those that have not."""
        deadline = time.monotonic() + timeout_s
        while missing := sorted(set(range(1, self._size)) - set(self._followers)):
            left = max(0.001, deadline - time.monotonic())
            self._listener.set_timeout(left)
            try:
                channel: Channel[Hello] = Channel(self._listener.accept(), Hello)
                channel.set_timeout(left)
                hello = channel.receive()
            except TimeoutError:
                raise TimeoutError(f"ranks {missing} did not connect to rank 0 within {timeout_s:.0f} s") from None
            channel.set_timeout(None)
            if hello is not None:
                self._followers[hello.rank] = channel

    def broadcast(self, message: FollowerFrame) -> None:
        """Give every follower the step's messages."""
        data = frame(self._encoder, message)
        for rank in range(1, self._size):
            self._followers[rank].send_bytes(data)

    def close(self) -> None:
        """Close all. Idempotent."""
        for channel in self._followers.values():
            channel.close()
        self._listener.close()


class Follower:
    """The link of a rank other than 0: reads one frame a step, says nothing."""

    def __init__(self, address: str, rank: int, timeout_s: float = _JOIN_S) -> None:
        self._rank = rank
        self._channel: Channel[FollowerFrame] = Channel.connect(address, FollowerFrame, timeout_s=timeout_s)
        self._channel.send(Hello(rank))

    def receive(self, block: bool, plan: bytes = b"") -> list[ToScheduler]:
        """See `engine.Link`; always waits for rank 0. Raises ConnectionError if that is gone."""
        message = self._channel.receive()
        if message is None:
            raise ConnectionError("rank 0 has closed the connection")
        if message.plan and plan and message.plan != plan:
            raise RanksDiverged(f"rank {self._rank} planned another step than rank 0")
        return list(message.messages)

    def send(self, outputs: list[Output], stats: Stats) -> None:
        """Nothing: rank 0 tells the HTTP workers."""

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._channel.close()
