"""SmolLM2 and SmolLM3: Hermes' format; SmolLM2 writes a list of all calls in the tags."""

from __future__ import annotations

from dataclasses import replace

from tokenmill.text.tools.hermes import FORMAT as HERMES


def matches(template: str) -> bool:
    """Return True for SmolLM3's template, and for prompts that ask for a list in the tags."""
    return "<tool_call>[" in template or ("xml_tools" in template and "<tool_call>" in template)


FORMAT = replace(HERMES, name="smollm", matches=matches, aliases=("smollm2", "smollm3"))
