"""Command R7B and A: a list of JSON objects between <|START_ACTION|> tags; Command R: in a block behind "Action:"."""

from __future__ import annotations

from tokenmill.text.tools._calls import Calls
from tokenmill.text.tools._json_style import JsonStyle


def matches(template: str) -> bool:
    """Return True for Cohere's templates."""
    return "<|START_ACTION|>" in template or ("Action:" in template and "tool_name" in template)


FORMAT = Calls(
    name="command_r",
    matches=matches,
    style=JsonStyle(
        name_keys=("tool_name", "name"),
        arguments_keys=("parameters", "arguments"),
        lead='"tool_call_id": "{index}", ',
    ),
    aliases=("cohere_command3", "command-r", "cohere"),
    opening="<|START_ACTION|>[\n    ",
    between=",\n    ",
    closing="\n]<|END_ACTION|>",
    trigger="<|START_ACTION|>",
    starts=("<|START_ACTION|>", "Action:\n```json", "Action: ```json"),
    ends=("<|END_ACTION|>", "```"),
)
