"""Mistral's newer templates: [TOOL_CALLS]name[ARGS]{…}; see mistral.py."""

from __future__ import annotations

from tokenmill.text.tools.mistral import ARGS as FORMAT

__all__ = ["FORMAT"]
