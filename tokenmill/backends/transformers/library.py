"""Models of transformers, or of code that a model's folder brings: configuration, class, and parts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from tokenmill.backends.transformers.defined import CODE
from tokenmill.errors import ModelError


class Parts(NamedTuple):
    """A model of transformers as functions of tensors (1, tokens, …). Not every class divides into body and head."""

    body: Callable[[Tensor, Tensor], Tensor]  # ids and positions -> the head's inputs
    head: Callable[[Tensor], Tensor]  # some of the body's results -> logits
    whole: Callable[[Tensor, Tensor], Tensor]  # ids and positions -> logits


def config_of(config: dict[str, Any], code: str) -> Any:
    """Return transformers' configuration of a config.json. Raises ModelError if the class does not accept it."""
    try:
        if code:
            return transformers.AutoConfig.from_pretrained(code, trust_remote_code=True)
        fields = {name: value for name, value in config.items() if name not in ("model_type", "auto_map")}
        return transformers.CONFIG_MAPPING[config["model_type"]].from_dict(fields)
    except Exception as error:  # classes raise what they like, and code of a repository anything
        what = f"transformers' configuration of a {config['model_type']} model"
        raise ModelError(f"config.json makes no {what}: {type(error).__name__}: {first_line(error)}.") from error


def class_of(config: dict[str, Any], theirs: Any, code: str) -> Any:
    """Return the class of the causal language model, which may be defined by a file of the folder `code`."""
    if not code:
        return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(theirs)]
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(config["auto_map"][CODE], code)


def parts_of(model: Any) -> Parts:
    """Return a model's functions. The head is the model itself with a body that returns given rows."""
    shell, stub = copy.copy(model), _Stub()  # the copy shares the weights
    shell._modules = {**model._modules, model.base_model_prefix: stub}

    def body(ids: Tensor, positions: Tensor) -> Tensor:
        hidden: Tensor = model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        return hidden

    def whole(ids: Tensor, positions: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return logits

    def head(rows: Tensor) -> Tensor:
        stub.rows = rows
        ids = torch.zeros(rows.shape[:2], dtype=torch.long, device=rows.device)
        logits: Tensor = shell(input_ids=ids, use_cache=False).logits
        return logits

    return Parts(body, head, whole)


class _Stub(nn.Module):
    """Body of a model that is called for its head only: it returns given rows."""

    rows: Tensor

    def forward(self, *_: Any, **__: Any) -> Any:
        return BaseModelOutputWithPast(last_hidden_state=self.rows)


def first_line(error: Exception) -> str:
    """Return the beginning of an error's message."""
    return (str(error).splitlines() or [""])[0][:200]
