"""Check for tensors of a checkpoint that a program does not read.

A tensor that would change the results is an error; any other is logged.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Set

from tokenmill.errors import ModelError
from tokenmill.program.ops import Weight
from tokenmill.quant._method import stored_names
from tokenmill.weights.checkpoint import Checkpoint, language_config

_LAYER = re.compile(r".*?\.\d+\.")
_HEAD = "lm_head.weight"
_NO_WEIGHT = re.compile(
    r".*(\.EncDecAttention\.relative_attention_bias\.weight|\.rotary_emb\.\w+|\.((kv?|v|q|output|prob_output)_scale)|\.(attn|attention)\.(bias|masked_bias|causal_mask)"
    r"|\.mlp\.act_fn\.(beta|eps))"
)
"""Tensors that are not weights: a bias of T5 that was never used, frequencies and causal masks that old versions of
transformers stored, scales of a quantized cache, constants of xIELU.
"""


_log = logging.getLogger(__name__)


def warn_of_unread(weights: Iterable[Weight], source: Checkpoint) -> None:
    """Log the tensors that the model does not read. Raises ModelError as `unread` does."""
    weights = list(weights)
    table = next((weight.name for weight in weights if weight.table), "")
    left = [name for name in unread(weights, source) if name != _HEAD]
    if left:
        shown = ", ".join(left[:5]) + (", …" if len(left) > 5 else "")
        _log.warning("The model does not read %d of the tensors in its files: %s.", len(left), shown)
    if table and another_head({part.name for weight in weights for part in weight.parts}, table, source):
        _log.warning(
            "lm_head.weight differs from the embedding and is not read, for config.json says tie_word_embeddings. Set "
            "that to false to use it."
        )


def unread(weights: Iterable[Weight], source: Checkpoint) -> list[str]:
    """Return the tensors that do not belong to `weights` nor change the results, such as those of another head.

    Raises ModelError with a tensor that belongs to something that the program computes: to a layer, or to one of its
    products, norms or tables. For a GGUF file, as in llama.cpp, every tensor does. A bias of zeros is ignored. If there
    are no weights, a library computes the model and checks.
    """
    weights = list(weights)
    if not weights:
        return []
    wanted = set(stored_names(weights, source))
    layers = {match[0] for name in wanted if (match := _LAYER.match(name))}
    modules = {name.rpartition(".")[0] for name in wanted} | {_HEAD.rpartition(".")[0]}
    left, shared = [], _shared_layers(source)
    for name in source.names():
        zeros = name not in wanted and name.endswith(".bias") and not source[name].data.any()
        if name in wanted or zeros or _NO_WEIGHT.fullmatch(name) or shared.fullmatch(name):
            continue
        match = _LAYER.match(name)
        computed = match[0] in layers if match else name.rpartition(".")[0] in modules and name != _HEAD
        if computed or source.format == "gguf":
            raise ModelError(
                f"The weights have a tensor {name!r}, which the {source.config.get('model_type')} model that their "
                "configuration describes does not read: answers would not be those that it was trained for. Set what "
                "belongs to it in config.json (a bias: attention_bias or mlp_bias), or the model_type that has it."
            )
        left.append(name)
    return left


def _shared_layers(source: Checkpoint) -> re.Pattern[str]:
    """Return a pattern of the keys and values of layers that use those of others (Gemma 3n): no model reads them."""
    part = language_config(source.config)
    layers, shared = (int(part.get(name) or 0) for name in ("num_hidden_layers", "num_kv_shared_layers"))
    numbers = "|".join(map(str, range(layers - shared, layers))) or "none"
    return re.compile(rf".*\.layers\.({numbers})\.self_attn\.[kv]_(proj|norm)\.\w+")


def another_head(wanted: Set[str], table: str, source: Checkpoint) -> bool:
    """Return True if a tied model's checkpoint has an output matrix that differs from the embedding `table`."""
    if _HEAD in wanted or source.shape(_HEAD) is None or source.shape(table) is None:
        return False
    own, tied = source[_HEAD], source[table]
    return (own.kind, own.shape) != (tied.kind, tied.shape) or own.data.tobytes() != tied.data.tobytes()


def cure_of_missing(name: str, source: Checkpoint) -> str:
    """Return the remedy for a missing tensor as a sentence after a space; "" if there is no known remedy."""
    if name == _HEAD:
        return (
            " If the embedding is the output matrix too, set tie_word_embeddings to true in config.json; transformers "
            "would fill it with random numbers."
        )
    wrapped = next((other for other in source.names() if other.endswith(f".{name}")), None)
    if wrapped is not None:
        prefix = wrapped.removesuffix(name)
        return f" There is {wrapped!r}: save the model without its wrapper, so that names do not begin with {prefix!r}."
    module = name.removesuffix("weight")
    others = [other for other in source.names() if other.startswith(module)] if module != name else []
    if others:
        shown = ", ".join(others[:4]) + (", …" if len(others) > 4 else "")
        return (
            f" There are {shown}, in which the method that the configuration names stores no matrix: copy config.json "
            "and quantize_config.json from where the weights are from."
        )
    return ""
