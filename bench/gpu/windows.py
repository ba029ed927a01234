"""Print the bytes of KV cache that a decoding sequence holds, with block tables by window and with one table for all.

    python3 -m bench.gpu.windows --shape gemma3-27b --tokens 32768

Computed from the program and the scheduler's tables; needs no GPU and no weights.
"""

from __future__ import annotations

import argparse

from bench.gpu.shapes import SHAPES
from tokenmill.backends.steps import CachePlan, block_bytes, cache_plan, one_table
from tokenmill.engine.tables import Tables
from tokenmill.models.base import program_of
from tokenmill.program.cost import cache_layout

_STEP, _BLOCK = 8192, 16  # tokens of a step and of a block


def held_bytes(plan: CachePlan, tokens: int, item_bytes: int) -> int:
    """Return the bytes of the blocks that the next token of a sequence reads or writes."""
    tables = Tables.of(plan.windows, _BLOCK, _STEP)
    blocks = sum(-(-tokens // _BLOCK) - first for first in tables.firsts(tokens - 1))
    return blocks * block_bytes(plan, item_bytes, _BLOCK)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="gemma3-27b")
    parser.add_argument("--tokens", default="1024,8192,32768,131072")
    parser.add_argument("--item-bytes", type=int, default=2, help="of a number in the cache; 1: FP8")
    args = parser.parse_args(words)
    layout = cache_layout(program_of(SHAPES[args.shape]))
    for tokens in (int(n) for n in args.tokens.split(",")):
        by_window, whole = cache_plan(layout, tokens + 1), one_table(layout)
        after, before = (held_bytes(plan, tokens, args.item_bytes) for plan in (by_window, whole))
        print(
            f"{args.shape}: {tokens:7,} tokens: {before / 1e6:9,.1f} MB in one table, {after / 1e6:9,.1f} MB in "
            f"{len(by_window.windows)} tables: {after / before:.1%}"
        )


if __name__ == "__main__":
    main()
