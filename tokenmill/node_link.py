"""Process on node 0 that stands for the ranks on another node: it is ready when they are, and ends when they do.

It waits for the agent of that node (`node.py`) and holds the connection to it. The supervisor starts and kills it as a
rank; its end closes the connection, at which the agent ends its ranks.
"""

from __future__ import annotations

import importlib
import logging
import select
import time
from typing import Any

from tokenmill.config import Settings
from tokenmill.errors import StartError
from tokenmill.wire.channel import Channel, ChannelError, Listener
from tokenmill.wire.control import ChildControl
from tokenmill.wire.messages import Failed, Ready, Stop
from tokenmill.wire.nodes import FromNode, NodeBegin, NodeFailed, NodeHello, NodeReady, NodeRefused

_TELL_S = 15.0  # between lines that tell for whom the server waits
_log = logging.getLogger(__name__)


class NodeMissing(StartError):
    """Another node has not joined in time, or does not fit."""

    variant = "ShardCannotStart"


def main(control: ChildControl) -> None:
    """Hold the connection to the node `control.configure.index`, until the supervisor stops this process or is gone.

    Raise a StartError if the node does not fit, does not join in time, or reports one.
    """
    configure = control.configure
    settings = Settings.from_dict(configure.settings)
    node, nodes = configure.index, settings.nodes
    address = nodes.node_address(node)
    listener = Listener(address, secret=nodes.secret())
    try:
        channel = _joined(control, listener, node, settings)
    finally:
        listener.close()
    if channel is None:
        return
    try:
        channel.send(NodeBegin(configure.generation))
        _relay(control, channel, node)
    except (OSError, ChannelError) as error:
        _lost(control, node, str(error))
    finally:
        channel.close()


def _joined(control: ChildControl, listener: Listener, node: int, settings: Settings) -> Channel[FromNode] | None:
    """Wait for the agent, and return the connection to it; None if the supervisor stops this process."""
    began, told = time.monotonic(), 0.0
    while _goes_on(control):
        waited = time.monotonic() - began
        if waited > settings.rank_timeout:
            raise NodeMissing(
                f"Node {node} did not join within {settings.rank_timeout:g} s (--rank-timeout). Start it with "
                f"--node-rank {node} and the same options otherwise; it must reach {listener.address}."
            )
        if waited - told > (_TELL_S if told else 3.0):
            told = waited
            _log.warning("Waiting for node %d at %s: start it with --node-rank %d.", node, listener.address, node)
        listener.set_timeout(0.2)
        try:
            channel: Channel[FromNode] = Channel(listener.accept(), FromNode)
        except TimeoutError:
            continue
        if _is_welcome(channel, node, settings):
            return channel
    return None


def _is_welcome(channel: Channel[FromNode], node: int, settings: Settings) -> bool:
    """Read an agent's hello. Raise NodeMissing, on both nodes, if it is of another version or number of nodes."""
    channel.set_timeout(5.0)
    try:
        hello = channel.receive()
    except (OSError, ChannelError):
        hello = None
    channel.set_timeout(None)
    if not isinstance(hello, NodeHello):
        channel.close()
        return False
    version: str = importlib.import_module("tokenmill").__version__
    reason = ""
    if hello.version != version:
        reason = f"Node {node} runs tokenmill {hello.version}, node 0 {version}. Install the same version on all nodes."
    elif (hello.node, hello.num_nodes) != (node, settings.num_nodes):
        reason = (
            f"Node {hello.node} of {hello.num_nodes} has joined as node {node} of {settings.num_nodes}. Give all "
            "nodes the same --num-nodes and --master-port, and each its own --node-rank."
        )
    if reason:
        channel.send(NodeRefused(reason))
        channel.close()
        raise NodeMissing(reason)
    return True


def _relay(control: ChildControl, channel: Channel[FromNode], node: int) -> None:
    """Report what the agent reports, until the supervisor stops this process, or a rank there has ended."""
    files: list[Any] = [channel, control]
    while _goes_on(control):
        if channel not in select.select(files, [], [], 1.0)[0]:
            continue
        message = channel.receive()
        if message is None:
            _lost(control, node, "the connection was closed")
            return
        if isinstance(message, NodeReady):
            control.send(Ready(None))
        elif isinstance(message, NodeFailed):
            control.send(Failed(message.variant, message.message, message.fatal, at=time.monotonic()))
            return


def _lost(control: ChildControl, node: int, why: str) -> None:
    control.send(Failed("ShardFailed", f"node {node} is lost: {why}", fatal=False, at=time.monotonic()))


def _goes_on(control: ChildControl) -> bool:
    """Return False once the supervisor stops this process or is gone."""
    messages = control.poll()
    return messages is not None and not any(isinstance(message, Stop) for message in messages)
