"""Find what extends the server by name: a module of ours, or an entry point of another package.

`find("models", "qwen3")` imports `tokenmill.models.qwen3`, or loads the entry point `qwen3` of the group
`tokenmill.models`. There is no registry: a file in the folder is enough.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
from importlib.metadata import entry_points
from typing import Any

from tokenmill.errors import Unsupported

_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")
_NO_PLUGINS = {"base"}
_SPOKEN = {"models": "model type", "quant": "quantization", "backends": "backend"}


def find(kind: str, name: str) -> Any:
    """The module tokenmill/<kind>/<name>.py, or what the entry point of that name loads; hyphens mean underscores.

    `name` may come from a file that anybody wrote. Raises Unsupported with the names that exist.
    """
    module = name.replace("-", "_").lower()
    if _NAME.fullmatch(module) and module not in _NO_PLUGINS:
        if importlib.util.find_spec(f"tokenmill.{kind}.{module}") is not None:
            return importlib.import_module(f"tokenmill.{kind}.{module}")
        for entry in entry_points(group=f"tokenmill.{kind}", name=module):
            return entry.load()
    raise Unsupported(_SPOKEN.get(kind, kind), name, known=names(kind))


def names(kind: str) -> list[str]:
    """Every name that `find` knows, sorted."""
    package = importlib.import_module(f"tokenmill.{kind}")
    modules = [found for found in pkgutil.iter_modules(package.__path__) if not found.name.startswith("_")]
    folders = {found.name for found in modules if found.ispkg}
    ours = folders or {found.name for found in modules}  # where there are folders, files are what they share
    return sorted((ours | {entry.name for entry in entry_points(group=f"tokenmill.{kind}")}) - _NO_PLUGINS)
