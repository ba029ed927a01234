"""Look up model types in transformers and in the code of a model's folder, without importing transformers or torch.

Their import takes ten seconds, which a misspelt model type need not cost.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from typing import Any

from tokenmill.errors import ModelError

CODE = "AutoModelForCausalLM"
"""The key of `auto_map` in config.json that names the class of a causal language model."""

_TABLE = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"


def is_known(model_type: str) -> bool:
    """Return True if transformers defines a causal language model of this type."""
    if "transformers" not in sys.modules:  # a program that has imported it may have registered types of its own
        types = listed()
        if types is not None:
            return model_type in types
    import transformers

    mapping = transformers.CONFIG_MAPPING
    return model_type in mapping and mapping[model_type] in transformers.MODEL_FOR_CAUSAL_LM_MAPPING


def listed() -> frozenset[str] | None:
    """Return the types in transformers' table of causal language models; None if its source has another form."""
    found = importlib.util.find_spec("transformers")
    if found is None or not found.origin:
        return None
    try:
        source = (Path(found.origin).with_name("models") / "auto" / "modeling_auto.py").read_bytes()
        return types_in(source)
    except (OSError, SyntaxError):
        return None


def types_in(source: bytes) -> frozenset[str] | None:
    """Return the types in the source of transformers' tables; None if there is no ordered dict of pairs of names."""
    for node in ast.parse(source).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(args=[pairs])) if name == _TABLE:
                try:
                    return frozenset(dict(ast.literal_eval(pairs)))
                except (ValueError, TypeError):
                    return None
    return None


def has_code(config: dict[str, Any], folder: str) -> bool:
    """Return True if a model's folder has the Python file that its config.json names for this kind of model.

    ModelError if config.json names a file in another repository.
    """
    named = config.get("auto_map")
    name = named.get(CODE) if isinstance(named, dict) else None
    if not isinstance(name, str):
        return False
    if "--" in name:
        where = name.partition("--")[0]
        raise ModelError(f"config.json names code in another repository ({where}). Copy its files to {folder}.")
    return bool(folder) and (Path(folder) / f"{name.partition('.')[0]}.py").is_file()
