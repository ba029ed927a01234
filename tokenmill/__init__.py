"""tokenmill: a server for large language models.

    from tokenmill import LLM

    with LLM("path/to/model") as llm:
        print(llm.generate("Once upon a time", max_new_tokens=20)[0].text)

`LLM` is imported on first use, because the command line and the supervisor do not need its imports.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenmill.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "__version__"]


def __getattr__(name: str) -> Any:
    """Import `LLM` on first use."""
    if name == "LLM":
        return importlib.import_module("tokenmill.llm").LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
