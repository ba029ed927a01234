"""Messages between the machines of an engine: node 0's link to another node, and the agent there."""

from __future__ import annotations

import msgspec


class NodeHello(msgspec.Struct, frozen=True, tag="hello"):
    """First message of an agent."""

    node: int
    num_nodes: int
    version: str  # of tokenmill


class NodeBegin(msgspec.Struct, frozen=True, tag="begin"):
    """Start the ranks of this node. They live until the connection ends."""

    generation: int  # number of earlier starts of the engine


class NodeRefused(msgspec.Struct, frozen=True, tag="refused"):
    """Answer to a `NodeHello` that does not fit. The agent reports the reason and ends."""

    reason: str


class NodeReady(msgspec.Struct, frozen=True, tag="ready"):
    """Report that all ranks of the node are ready."""


class NodeFailed(msgspec.Struct, frozen=True, tag="failed"):
    """Report that a rank of the node has died, or hangs; the agent has ended the others. As of `Failed`."""

    variant: str
    message: str
    fatal: bool


FromNode = NodeHello | NodeReady | NodeFailed
ToNode = NodeBegin | NodeRefused
