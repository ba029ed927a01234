"""The links of rank 0 in their order, which worker and offline engine share."""

from __future__ import annotations

from typing import NamedTuple

from tokenmill.engine.engine import Link
from tokenmill.engine.extended import Extended
from tokenmill.engine.gated import Gated, Source
from tokenmill.engine.ranks import Broadcast, RankServer
from tokenmill.engine.timed import Timed
from tokenmill.runtime.assembly import Assembled


class Links(NamedTuple):
    """The link that the engine gets, and the gate inside of it, which is the caller's to close."""

    link: Link
    gated: Gated


def links_of(source: Source, parts: Assembled, ranks: RankServer | None = None) -> Links:
    """Put the links of rank 0 around `source`. `ranks`: the other ranks, if there are any."""
    prerequisites = [] if parts.constraints is None else [parts.constraints]
    gated = Gated(source, prerequisites)
    link: Link = gated
    if parts.constraints is not None:
        link = Extended(link, parts.constraints)
    if ranks is not None:
        link = Broadcast(link, ranks)
    return Links(Timed(link, parts.scheduler), gated)
