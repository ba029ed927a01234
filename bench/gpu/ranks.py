"""Ranks that share a model: measure with one card what can be, and predict the steps of several cards.

    python -m bench.gpu.ranks --only predict                needs no GPU
    python -m bench.gpu.ranks --only sums,shards --shape 8b

sums: two ranks in this process, each on a stream of its own, sum rows through the card's own memory: the time of our
kernels without that of a link. shards: steps of one rank of 1, 2, 4, 8, which sums with itself: its products,
attention and launches as they are, without waiting. predict: the steps of several cards by the cost model, and from
the measured shards if there are any, with the assumptions below.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from bench.gpu.floor import decode_ms
from bench.gpu.shapes import SHAPES
from bench.gpu.tell import tell
from tokenmill.backends.cuda.collectives.choice import usual
from tokenmill.backends.cuda.explain_ranks import num_launches
from tokenmill.backends.cuda.prepare import fused
from tokenmill.models.base import program_of
from tokenmill.program import ops
from tokenmill.program.shard import shard
from tokenmill.program.value import Program

EXCHANGE_US = 4.0
"""Assumption: from a rank's last store to the others' reading it, over NVLink, and the wait for the slowest rank."""
LINK_BYTES_S = 0.75 * 450e9
"""Assumption: what a card sends over NVLink 4, of 450 GB/s in each direction."""
RANKS, ROWS, CONTEXT = (1, 2, 4, 8), (1, 8, 32, 64, 128), 512
_ONE_CARD_MS = {"8b": {1: 3.95, 8: 4.46, 32: 4.95, 64: 6.27, 128: 7.56}}
"""Measured steps of one card, from docs/performance.md"""


def sum_us(nbytes: int, ranks: int) -> float:
    """Return the microseconds that a sum over the ranks takes besides its launch, by the assumptions."""
    if ranks == 1:
        return 0.0
    if nbytes <= usual(ranks, library=True).one_shot:
        return EXCHANGE_US + nbytes * (ranks - 1) / LINK_BYTES_S * 1e6
    return 2 * EXCHANGE_US + 2 * nbytes * (ranks - 1) / ranks / LINK_BYTES_S * 1e6


def sums_ms(program: Program, ranks: int, rows: int) -> float:
    """Return the milliseconds of all sums over the ranks of a decode step, and of gathering its logits."""
    sizes = [op.x.width * rows * 2 for op in program.ops if isinstance(op, ops.AllReduce | ops.Gather)]
    return sum(sum_us(size, ranks) for size in sizes) / 1e3


def predict(shape: str, shards: dict[tuple[int, int], float]) -> list[str]:
    """Return the lines of a table. `shards`: measured milliseconds by ranks and rows."""
    whole = program_of(SHAPES[shape])
    lines = [
        f"Predicted decode steps of the {shape} shape, ms (context {CONTEXT}; a sum takes {EXCHANGE_US:g} µs and "
        f"{LINK_BYTES_S / 1e9:.0f} GB/s)",
        "| cards | launches | sums a step | " + " | ".join(f"{rows} rows" for rows in ROWS) + " |",
        "|---" * (3 + len(ROWS)) + "|",
    ]
    for ranks in RANKS:
        program = fused(shard(whole, ranks))
        count = sum(isinstance(op, ops.AllReduce) for op in program.ops)
        cells = []
        for rows in ROWS:
            floor, link = decode_ms(program, rows, CONTEXT), sums_ms(program, ranks, rows)
            one = decode_ms(fused(whole), rows, CONTEXT)
            slower = _ONE_CARD_MS.get(shape, {}).get(rows, 1.1 * one) / one
            cell = f"{floor * slower + link:.2f}"
            if (ranks, rows) in shards:
                cell += f" ({shards[ranks, rows] + link:.2f})"
            cells.append(cell)
        lines.append(f"| {ranks} | {num_launches(program)} | {count} | " + " | ".join(cells) + " |")
    return [*lines, "In brackets: the measured step of one rank alone, plus the sums." if shards else ""]


def measure_sums(widths: Sequence[int] = (4096,), rows: Sequence[int] = (1, 8, 32, 64, 128, 512)) -> None:
    """Print the microseconds of sums of two ranks in this process."""
    import torch

    from bench.gpu.alone import pair
    from bench.gpu.timing import median_us
    from tokenmill.backends.cuda.collectives.base import Normed

    for width in widths:
        peers = pair(max(rows), width)
        xs = [torch.randn(max(rows), width, device="cuda").bfloat16() for _ in peers]
        outs = [torch.empty_like(x) for x in xs]
        weight, y = torch.ones(width, device="cuda").bfloat16(), torch.zeros_like(xs[0])
        totals = [torch.empty_like(x) for x in xs]
        sums = [
            each.reduction(x, out, Normed(y, weight, None, total, out, 1e-5, False))
            for each, x, out, total in zip(peers, xs, outs, totals, strict=True)
        ]
        streams = [torch.cuda.Stream() for _ in peers]
        for count in rows:
            found: dict[str, float] = {}
            for name in ("one_shot", "run_normed", "two_shots"):
                if name != "two_shots" and count > peers[0].layout.rows.room:
                    continue
                graphs = []
                for each, stream in zip(sums, streams, strict=True):
                    launch = getattr(each, name)
                    with torch.cuda.stream(stream):
                        launch(count)
                    graphs.append((torch.cuda.CUDAGraph(), launch, stream))
                torch.cuda.synchronize()
                for graph, launch, stream in graphs:
                    with torch.cuda.graph(graph, stream=stream):
                        for _ in range(20):
                            launch(count)

                def both(graphs: list[Any] = graphs) -> None:
                    main = torch.cuda.current_stream()
                    for graph, _, stream in graphs:
                        stream.wait_stream(main)
                        with torch.cuda.stream(stream):
                            graph.replay()
                    for _, _, stream in graphs:
                        main.wait_stream(stream)

                found[name] = round(median_us(both) / 20, 1)
            peers[0].check()
            tell(bench="sums", rows=count, width=width, bytes=2 * count * width, us=found)


def measure_shards(shape: str, ranks: Sequence[int], rows: Sequence[int]) -> dict[tuple[int, int], float]:
    """Return the milliseconds of a decode step of one rank, by ranks and rows, and print them."""
    from bench.gpu.alone import step_ms

    found = {}
    for size in ranks:
        for count, ms in step_ms(SHAPES[shape], size, rows):
            found[size, count] = ms
            tell(bench="shard", shape=shape, ranks=size, rows=count, ms=round(ms, 3))
    return found


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="predict", help="parts, by comma")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--ranks", default="1,2,4,8")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    args = parser.parse_args(words)
    parts, shards = args.only.split(","), dict[tuple[int, int], float]()
    if "sums" in parts:
        measure_sums()
    if "shards" in parts:
        shards = measure_shards(args.shape, [*map(int, args.ranks.split(","))], [*map(int, args.rows.split(","))])
    print("\n".join(predict(args.shape, shards)), flush=True)


if __name__ == "__main__":
    main()
