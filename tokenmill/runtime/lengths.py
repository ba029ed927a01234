"""How long a sequence and its prompt may be, from what model, tokenizer and user name."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenmill.errors import ArgumentError, ModelError, StartError
from tokenmill.program import ops
from tokenmill.program.value import Program
from tokenmill.weights.checkpoint import model_config
from tokenmill.weights.source import ModelSource, read_json

MOCK_LENGTH = 8192
_NO_LENGTH = 10**9  # transformers writes 10^30 for "none"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelLength:
    """What a model was made for, in tokens."""

    total: int  # of a sequence
    prompt: int  # whose numbers are those of transformers
    unstretched: int  # of a sequence, before rope scaling


def of_model(config: dict[str, Any], program: Program | None = None) -> ModelLength:
    """The length of the model's rotary positions, stretched by their scaling, or else config.json's; else the mock's.

    `program`: the model's, None for a mock.
    """
    tables = {op.rope for op in program.ops if isinstance(op, ops.Rope)} if program is not None else set()
    if tables:
        found = ModelLength(
            min(table.longest for table in tables),
            min(table.exact_prompt for table in tables),
            min(table.max_position for table in tables),
        )
    else:
        given = config.get("max_position_embeddings")
        given = MOCK_LENGTH if given is None else given
        if not isinstance(given, int):
            raise ModelError(f"config.json: max_position_embeddings is {given!r}; expected a number of at least 2.")
        found = ModelLength(given, given, given)
    if found.total < 2:
        raise ModelError(f"config.json: max_position_embeddings is {found.total}; expected a number of at least 2.")
    return found


def of_mock(source: ModelSource) -> ModelLength:
    """The same of a folder that may have a tokenizer and nothing else, or a model of a type that is not known."""
    from tokenmill.models.base import program_of

    try:
        config = model_config(source)
    except ModelError:
        return of_model({})
    try:
        return of_model(config, program_of(config))
    except StartError:
        return of_model(config)


def longest(source: ModelSource, model: ModelLength, wanted: int | None) -> int:
    """Tokens of the longest sequence: as wanted, else what model and tokenizer were made for.

    A tokenizer's length that is no more than the unstretched one was written before the model was stretched.
    """
    if wanted is not None:
        if wanted > model.total:
            _log.warning(
                "max_total_tokens is %d, but the model was made for %d tokens: answers may suffer.", wanted, model.total
            )
        return wanted
    tokenizer = _tokenizer_length(source)
    if model.total > model.unstretched:
        _log.info("The model's rope scaling stretches its %d tokens to %d.", model.unstretched, model.total)
        if tokenizer is not None and tokenizer <= model.unstretched:
            tokenizer = None
    return min(model.total, tokenizer or model.total)


def max_input_tokens(wanted: int | None, total: int, model: ModelLength) -> int:
    """Tokens of the longest prompt of sequences of `total` tokens: as wanted, else what is computed as by transformers.

    ArgumentError if they leave no token for the answer.
    """
    if wanted is not None and wanted >= total:
        raise ArgumentError(
            f"`max_input_tokens` ({wanted}) must be < `max_total_tokens`, which model and KV cache limit to {total}."
        )
    return wanted or min(total - 1, model.prompt)


def tell_prompt_limit(wanted: int | None, total: int, model: ModelLength) -> None:
    """Log what becomes of prompts that dynamic rope scaling would rotate otherwise than transformers does."""
    if wanted is not None and wanted > model.prompt:
        _log.warning(
            "max_input_tokens is %d, but of prompts of more than %d tokens dynamic rope scaling rotates each token by "
            "its own position, transformers all by the last one's: the numbers differ.", wanted, model.prompt,
        )  # fmt: skip
    elif wanted is None and total - 1 > model.prompt:
        _log.info(
            "Prompts may have %d tokens, of the %d of a sequence: longer ones are not rotated as by transformers under "
            "dynamic rope scaling. Give --max-input-tokens to take them all the same.", model.prompt, total,
        )  # fmt: skip


def _tokenizer_length(source: ModelSource) -> int | None:
    """What tokenizer_config.json says of a sequence's length, if anything sensible."""
    path = Path(source.path) / "tokenizer_config.json"
    length = read_json(path).get("model_max_length") if path.is_file() else None
    return int(length) if isinstance(length, int | float) and 2 <= length < _NO_LENGTH else None
