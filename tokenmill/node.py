"""Agent: runs the ranks of an engine on a machine other than node 0, for as long as node 0 wants them.

It needs the same options as node 0, finds the model on its own disk, and connects to node 0 again and again. A
connection is one start of the engine: the ranks begin with it and end with it.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import select
import signal
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from tokenmill import fetch
from tokenmill.config import Settings
from tokenmill.errors import StartError
from tokenmill.process import Child
from tokenmill.progress import display
from tokenmill.ranks import Ranks, check_machine
from tokenmill.rundir import run_dir
from tokenmill.watch import TICK_S
from tokenmill.wire.channel import Channel, ChannelError
from tokenmill.wire.messages import ModelReady, Progress, Ready
from tokenmill.wire.nodes import NodeBegin, NodeFailed, NodeHello, NodeReady, NodeRefused, ToNode

_TRY_S = 2.0  # for a connection, before the next attempt
_TELL_S = 30.0  # between lines that tell for whom this node waits
_log = logging.getLogger(__name__)


class NodeFailure(StartError):
    """The ranks of this node cannot run, or node 0 has refused it."""

    def __init__(self, variant: str, message: str) -> None:
        super().__init__(message)
        self.variant = variant


class _Stopped(BaseException):
    """A signal asks this process to end."""


def run_node(settings: Settings) -> int:
    """Serve node 0 until a signal, and return the exit code 0. Raise a StartError if this node cannot."""
    check_machine(settings)
    nodes = settings.nodes
    address, screen = nodes.node_address(nodes.rank), display(json=settings.json_output)
    with run_dir() as folder, contextlib.suppress(_Stopped), _stopped_by_signals():
        model = ModelReady(msgspec.to_builtins(fetch.fetch(settings, screen.progress)))
        ranks = Ranks(0, settings, folder)
        screen.line(f"Node {nodes.rank} of {nodes.size}: joining node 0 at {address}.")
        try:
            while True:
                with contextlib.closing(_connected(address, nodes.secret())) as channel:
                    _serve(channel, ranks, model, settings)
                ranks.kill()
                time.sleep(0.2)
        finally:
            ranks.kill()
            screen.close()
    return 0


def _connected(address: str, secret: bytes) -> Channel[ToNode]:
    """Return a connection to node 0, however long that takes. Raise WrongSecret."""
    told = time.monotonic()
    while True:
        try:
            return Channel.connect(address, ToNode, timeout_s=_TRY_S, secret=secret)
        except OSError as error:
            if time.monotonic() - told > _TELL_S:
                told = time.monotonic()
                _log.warning("Node 0 does not answer at %s yet (%s).", address, error)


def _serve(channel: Channel[ToNode], ranks: Ranks, model: ModelReady, settings: Settings) -> None:
    """Run the ranks of one start of the engine. Return when the connection or a rank has ended."""
    version: str = importlib.import_module("tokenmill").__version__
    try:
        channel.send(NodeHello(settings.node_rank, settings.num_nodes, version))
        message = channel.receive()
        if isinstance(message, NodeRefused):
            raise NodeFailure("ShardCannotStart", message.reason)
        if not isinstance(message, NodeBegin):
            return
        ranks.generation = message.generation
        ranks.start(model)
        _watch(channel, ranks)
    except (OSError, ChannelError) as error:
        _log.warning("The connection to node 0 broke: %s.", error)


def _watch(channel: Channel[ToNode], ranks: Ranks) -> None:
    """Watch the ranks until one ends or the connection does."""
    told = False
    while True:
        files: list[Any] = [child.control for child in ranks.children.values() if not child.control.closed]
        if channel in select.select([channel, *files], [], [], TICK_S)[0] and channel.receive() is None:
            _log.info("Node 0 has ended this start of the engine.")
            return
        if (dead := _dead(ranks)) is not None:
            failure = ranks.end(dead).failure
            fatal = failure is not None and failure.fatal
            variant = failure.variant if failure is not None else "ShardFailed"
            message = f"{dead.name}: {dead.how_it_ended()}"
            _log.error("The %s has died (%s)", dead.name, dead.how_it_ended())
            channel.send(NodeFailed(variant, message, fatal))
            if fatal and not told:
                raise NodeFailure(variant, message)
            return
        if ranks.ready and not told:
            told = True
            channel.send(NodeReady())
            _log.info("The ranks of this node are ready")


def _dead(ranks: Ranks) -> Child | None:
    """Read the messages of the ranks, and return one that has died or hangs, if any."""
    found = None
    for child in ranks.children.values():
        dead = child.dead
        for message in child.poll():
            if isinstance(message, Ready):
                child.ready = True
            elif isinstance(message, Progress):
                _log.debug("%s: %s", child.name, message.phase)
        if found is None and (dead or child.control.closed):
            found = child
    return found or ranks.hung()


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Raise _Stopped in the block at the first signal that asks to stop. Later ones are ignored: it is ending."""

    def stop(number: int, frame: object) -> None:
        for other in (signal.SIGINT, signal.SIGTERM):
            signal.signal(other, signal.SIG_IGN)
        raise _Stopped

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    yield
