"""Agreement of ranks, before anything is loaded: they must run the same version, model and options."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from tokenmill.errors import StartError
from tokenmill.parallel.group import Group

_MOST = 3  # differences that are told


class RanksDiffer(StartError):
    """Ranks of one engine run different programs, models or options."""

    variant = "ShardCannotStart"


def agree(group: Group, facts: Mapping[str, str]) -> None:
    """Compare what each rank runs, on every rank. `facts`: by name, as "tokenmill": "0.9".

    Raise RanksDiffer, which names the first rank that differs from rank 0, and in what.
    """
    all_facts = [msgspec.msgpack.decode(data, type=dict[str, str]) for data in group.exchange(_encoded(facts))]
    for rank, other in enumerate(all_facts):
        names = [name for name in {**all_facts[0], **other} if other.get(name) != all_facts[0].get(name)]
        if names:
            told = "; ".join(
                f"{name} is {other.get(name, 'not known')} there and {all_facts[0].get(name, 'not known')} on rank 0"
                for name in names[:_MOST]
            )
            raise RanksDiffer(
                f"Rank {rank} differs from rank 0: {told}. Start every rank with the same version of tokenmill, the "
                "same files of the model and the same options."
            )


def _encoded(facts: Mapping[str, str]) -> bytes:
    return msgspec.msgpack.encode(dict(facts))
