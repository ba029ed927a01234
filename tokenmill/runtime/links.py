"""Chain of links of rank 0, shared by the engine worker and the offline engine."""

from __future__ import annotations

from typing import NamedTuple

from tokenmill.engine.engine import Link
from tokenmill.engine.extended import Extended
from tokenmill.engine.gated import Gated, Source
from tokenmill.engine.ranks import Broadcast, RankServer
from tokenmill.engine.timed import Timed
from tokenmill.runtime.assembly import Assembled


class Links(NamedTuple):
    """The outermost link, for the engine, and the gate inside it. The caller closes the gate."""

    link: Link
    gated: Gated


def links_of(source: Source, parts: Assembled, ranks: RankServer | None = None) -> Links:
    """Return the links of rank 0 around `source`. `ranks`: connections to the other ranks; None: one rank."""
    prerequisites = [] if parts.constraints is None else [parts.constraints]
    gated = Gated(source, prerequisites)
    link: Link = gated
    if parts.constraints is not None:
        link = Extended(link, parts.constraints)
    if ranks is not None:
        link = Broadcast(link, ranks)
    return Links(Timed(link, parts.scheduler), gated)
