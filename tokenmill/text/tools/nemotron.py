"""Nemotron Nano 2 and Super 1.5: a list of JSON objects between <TOOLCALL> tags."""

from __future__ import annotations

from tokenmill.text.tools._calls import Calls
from tokenmill.text.tools._json_style import JsonStyle


def matches(template: str) -> bool:
    """Return True for templates with such tags."""
    return "<TOOLCALL>" in template


FORMAT = Calls(
    name="nemotron",
    matches=matches,
    style=JsonStyle(),
    aliases=("nemotron_v2", "nemotron_nano_v2"),
    opening="<TOOLCALL>[",
    between=", ",
    closing="]</TOOLCALL>",
    trigger="<TOOLCALL>",
    starts=("<TOOLCALL>",),
    ends=("</TOOLCALL>",),
)
