"""Maximum lengths of sequences and prompts, by model, tokenizer and user."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenmill.errors import ArgumentError, ModelError
from tokenmill.weights.checkpoint import model_config
from tokenmill.weights.source import ModelSource, read_json

if TYPE_CHECKING:
    from tokenmill.models.base import Config

MOCK_LENGTH = 8192
_NO_LENGTH = 10**9  # transformers writes 10^30 for "no limit"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelLength:
    """Lengths that a model supports, in tokens."""

    total: int  # of a sequence
    prompt: int  # longest prompt whose logits equal those of transformers
    unstretched: int  # of a sequence, before rope scaling


def of_model(config: Config) -> ModelLength:
    """Return the lengths of a model. ModelError if there is no room for a prompt and an answer."""
    length = ModelLength(config.max_positions, config.exact_prompt, config.unstretched)
    if length.total < 2:
        raise ModelError(f"config.json: max_position_embeddings is {length.total}; expected a number of at least 2.")
    return length


def of_mock(source: ModelSource) -> ModelLength:
    """Return the lengths for a mock engine. The folder may hold only a tokenizer, or a model of an unknown type."""
    from tokenmill.models.base import Config, facts_of

    try:
        content = model_config(source)
    except ModelError:
        content = {}
    config = facts_of(content)
    if type(config) is Config and config.max_position_embeddings is None:
        config.max_position_embeddings = MOCK_LENGTH
    return of_model(config)


def longest(source: ModelSource, model: ModelLength, wanted: int | None) -> int:
    """Return the maximum length of a sequence, in tokens: `wanted`, else that of model and tokenizer.

    A tokenizer's length is ignored if it is at most the length before rope scaling: it was written before the scaling.
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
    """Return the maximum length of a prompt, in tokens, for sequences of at most `total` tokens.

    `wanted`: None: the longest prompt whose logits equal those of transformers. Raise ArgumentError if `wanted` leaves
    no token for the answer.
    """
    if wanted is not None and wanted >= total:
        raise ArgumentError(
            f"`max_input_tokens` ({wanted}) must be < `max_total_tokens`, which model and KV cache limit to {total}."
        )
    return wanted or min(total - 1, model.prompt)


def log_prompt_limit(wanted: int | None, total: int, model: ModelLength) -> None:
    """Log the limit of prompts, or the difference from transformers, under dynamic rope scaling."""
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
    """Return the maximum length in tokenizer_config.json; None if there is none, or no plausible one."""
    path = Path(source.path) / "tokenizer_config.json"
    length = read_json(path).get("model_max_length") if path.is_file() else None
    return int(length) if isinstance(length, int | float) and 2 <= length < _NO_LENGTH else None
