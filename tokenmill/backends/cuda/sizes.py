"""The sizes and int arrays of a step as its launches read them, and the device buffer that holds the arrays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenmill.backends.base import StepInputs, StepLimits
from tokenmill.backends.cuda.device import ALIGNED, Device
from tokenmill.backends.cuda.shapes import Contexts, contexts_of
from tokenmill.backends.steps import step_tokens
from tokenmill.program.value import Value


class Expansion(NamedTuple):
    """Runs of a step whose compressed rows are expanded together, `runs` of `rows` and `tiles` of `all_tiles`.

    `rows` (n, 3): slot, number of keys, and place of the first one among the expanded. `all_tiles` (n, 5): those of
    `Sizes.tiles`, and that place. `keys`: of all runs; `longest`: of one.
    """

    rows: Tensor
    all_tiles: Tensor
    first_run: int
    runs: int
    first_tile: int
    tiles: int
    keys: int
    longest: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes and arrays of a step, or of a run of the encoder; all arrays are on the device.

    `pairs` (T, 2): slot and position of each token. `samples` (R,): tokens whose rows sample; None: all tokens.
    `singles`: tokens that are the only one of their row; None: all tokens. `tiles`: most tokens of a tile -> tiles
    (n, 4) of the other tokens. `context`: the most keys that one of these attends to. `contexts`: the kind
    of those of single tokens. `early`: kernels that support it are launched before the one before has ended.
    `expansions`: of the runs, for attention to compressed rows.
    """

    tokens: int
    sampling: int
    pairs: Tensor
    samples: Tensor | None = None
    singles: Tensor | None = None
    tiles: dict[int, Tensor] = field(default_factory=dict)
    context: int = 0
    contexts: Contexts = Contexts.ALIKE
    early: bool = False
    expansions: tuple[Expansion, ...] = ()

    def of(self, v: Value) -> int:
        """Return the rows of a value."""
        return self.sampling if v.spec.rows == "samples" else self.tokens


class StepArrays:
    """The int arrays of the step that is launched next, in one buffer: captured graphs hold its address.

    `padding`: the slot of rows that only pad. `tile_tokens`: the most tokens of a tile, for each kind of attention.
    `expands`: the most tokens of a tile, and compressed rows that are expanded together; None: none are.
    `kv_heads`: the fewest of a layer. `inputs`: tokens of the largest run of an encoder.
    """

    def __init__(
        self,
        limits: StepLimits,
        device: Device,
        padding: int,
        tile_tokens: Iterable[int],
        expands: tuple[int, int] | None = None,
        kv_heads: int = 1,
        inputs: int = 0,
    ) -> None:
        self._device, self._padding, self._tile_tokens = device, padding, sorted(tile_tokens)
        self._expands, self._kv_heads = expands, kv_heads
        tokens = max(limits.max_batch_tokens, inputs)
        most = tokens + limits.max_batch_size + 4 * ALIGNED  # and the gaps between aligned sections
        pairs, samples_and_singles, tiles = 2 * most, most, 4 * most * max(1, len(self._tile_tokens))
        expansions = 8 * most if expands else 0
        total = pairs + samples_and_singles + tiles + expansions
        self.buffer = torch.zeros(total, dtype=torch.int32, device=device.torch)

    def decode(self, slots: NDArray[np.int32], starts: NDArray[np.int32], padded: int) -> Sizes:
        """Send a step of one token a row, all sampling, padded to so many rows."""
        pairs = np.zeros((padded, 2), np.int32)
        pairs[:, 0] = self._padding
        pairs[: len(slots), 0], pairs[: len(slots), 1] = slots, starts
        (sent,) = self._device.send_into(self.buffer, [pairs.reshape(-1)])
        return Sizes(padded, padded, sent, contexts=contexts_of(starts, self._kv_heads))

    def mixed(self, inputs: StepInputs, *, as_runs: bool = False) -> Sizes:
        """Send a step of any rows: single tokens and runs of several, sampling or not.

        `as_runs`: single tokens are runs, too.
        """
        slots, starts, counts = inputs.slots, inputs.starts, inputs.counts
        tokens = step_tokens(inputs)
        pairs = np.stack((tokens.slots, tokens.positions), 1).astype(np.int32)
        single = (counts == 1) & (not as_runs)
        runs = np.flatnonzero(~single)
        kinds = self._tile_tokens if len(runs) else []
        tiles = [tiles_of(tokens.firsts[runs], starts[runs], counts[runs], slots[runs], most) for most in kinds]
        sections = [
            pairs.reshape(-1), tokens.samples.astype(np.int32), tokens.firsts[single].astype(np.int32),
            *(tile.reshape(-1) for tile in tiles),
        ]  # fmt: skip
        planned = None
        if self._expands is not None and len(runs):
            planned = expansions_of(tokens.firsts[runs], starts[runs], counts[runs], slots[runs], *self._expands)
            sections += [planned.rows.reshape(-1), planned.tiles.reshape(-1)]
        sent = self._device.send_into(self.buffer, sections)
        held = {most: made.view(-1, 4) for most, made in zip(kinds, sent[3:], strict=False)}
        expansions = () if planned is None else planned.sent(sent[-2].view(-1, 3), sent[-1].view(-1, 5))
        contexts = contexts_of(starts[single], self._kv_heads)
        context = int((starts + counts)[runs].max(initial=0))
        return Sizes(len(pairs), len(tokens.samples), sent[0], sent[1], sent[2], held, context, contexts,
                     expansions=expansions)  # fmt: skip


def tiles_of(
    firsts: NDArray[np.int64], starts: NDArray[np.int32], counts: NDArray[np.int32], slots: NDArray[np.int32], most: int
) -> NDArray[np.int32]:
    """Cut runs of tokens into tiles of at most `most`: (n, 4) first token of the step, its position, tokens, slot."""
    pieces = -(-counts // most)
    row = np.repeat(np.arange(len(counts)), pieces)
    done = (np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * most
    made = (firsts[row] + done, starts[row] + done, np.minimum(most, counts[row] - done), slots[row])
    return np.stack(made, 1).astype(np.int32)


class Expansions(NamedTuple):
    """Expansions of a step on the host: `rows` (n, 3), `tiles` (n, 5), and numbers of runs and of tiles of each one."""

    rows: NDArray[np.int32]
    tiles: NDArray[np.int32]
    runs_of: list[int]
    tiles_of: list[int]

    def sent(self, rows: Tensor, tiles: Tensor) -> tuple[Expansion, ...]:
        """Return the expansions, with `rows` and `tiles` as copied to the device."""
        made, run, tile = [], 0, 0
        for runs, pieces in zip(self.runs_of, self.tiles_of, strict=True):
            keys = self.rows[run : run + runs, 1]
            made.append(Expansion(rows, tiles, run, runs, tile, pieces, int(keys.sum()), int(keys.max())))
            run, tile = run + runs, tile + pieces
        return tuple(made)


def expansions_of(
    firsts: NDArray[np.int64], starts: NDArray[np.int32], counts: NDArray[np.int32], slots: NDArray[np.int32],
    tile_tokens: int, most: int,
) -> Expansions:  # fmt: skip
    """Divide runs, in order, among expansions of at most `most` keys, which no run has more of."""
    keys = starts + counts
    places, which = np.zeros_like(keys), np.zeros_like(keys)
    filled = expansion = 0
    for i, n in enumerate(keys.tolist()):
        if filled + n > most:
            expansion, filled = expansion + 1, 0
        places[i], which[i] = filled, expansion
        filled += n
    pieces = -(-counts // tile_tokens)
    tiles = tiles_of(firsts, starts, counts, slots, tile_tokens)
    rows = np.stack((slots, keys, places), 1).astype(np.int32)
    tiles = np.concatenate((tiles, np.repeat(places, pieces)[:, None]), 1).astype(np.int32)
    return Expansions(rows, tiles, np.bincount(which).tolist(), np.bincount(which, pieces).astype(int).tolist())
