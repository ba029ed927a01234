"""Find plug-ins by name: modules of this package, or entry points of other packages.

`find("models", "qwen3")` imports `tokenmill.models.qwen3`, or loads the entry point `qwen3` of the group
`tokenmill.models`. There is no registry: a file in the folder is sufficient.
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
_NO_PLUGINS = {"base", "coded", "formats"}
_SPOKEN = {"models": "model type", "quant": "quantization", "backends": "backend"}


def find(kind: str, name: str) -> Any:
    """Import tokenmill/<kind>/<name>.py, or load the entry point of that name. Hyphens count as underscores.

    `name`: may be untrusted. Raises Unsupported with the existing names.
    """
    module = name.replace("-", "_").lower()
    if _NAME.fullmatch(module) and module not in _NO_PLUGINS:
        if importlib.util.find_spec(f"tokenmill.{kind}.{module}") is not None:
            return importlib.import_module(f"tokenmill.{kind}.{module}")
        for entry in entry_points(group=f"tokenmill.{kind}", name=module):
            return entry.load()
    raise Unsupported(_SPOKEN.get(kind, kind), name, known=names(kind))


def names(kind: str) -> list[str]:
    """Return every name that `find` accepts, sorted."""
    package = importlib.import_module(f"tokenmill.{kind}")
    modules = [found for found in pkgutil.iter_modules(package.__path__) if not found.name.startswith("_")]
    folders = {found.name for found in modules if found.ispkg}
    ours = folders or {found.name for found in modules}  # if plug-ins are folders, files are code that they share
    return sorted((ours | {entry.name for entry in entry_points(group=f"tokenmill.{kind}")}) - _NO_PLUGINS)
