"""The prompt of a chat: its messages and tools in the form that the model's chat template takes, rendered."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from tokenmill.text.chat_request import Chat, check_messages, template_fields
from tokenmill.text.chat_template import ChatTemplate
from tokenmill.text.chat_tools import Tools

_DEFAULT_PROMPT = (
    "\nIf one of these functions helps to answer, reply with nothing but a call of it, a JSON object of the form "
    '{"name": name of the function, "parameters": its arguments by name}, with values and no variables in it.\n'
)


def render(chat: Chat, template: ChatTemplate, tools: Tools | None) -> str:
    """Return the prompt that a chat template makes of a chat. Raises ValidationError, TemplateError."""
    check_messages(chat.messages)
    shown_tools = tools if tools is not None and tools.choice != "none" else None
    source = template.source if shown_tools is None else template.tool_source
    kwargs = {**template_fields(chat, source), **(chat.chat_template_kwargs or {})}
    messages = _named_for(source, newer(chat.messages))
    begins = chat.add_generation_prompt
    if messages[-1].get("tool_calls") and not chat.continue_final_message and begins is None:
        begins = True  # a call is complete, also when it is written out as text
    if "tool_calls" not in source:
        messages = written_out(messages)
    if shown_tools is not None:
        messages = with_tool_prompt(messages, shown_tools, chat.tool_prompt, template_has_tools=template.shows_tools)
    return template.render(
        messages,
        tools=shown_tools.given if shown_tools is not None and template.shows_tools else None,
        documents=chat.documents,
        add_generation_prompt=begins,
        continue_final_message=chat.continue_final_message,
        kwargs=kwargs,
    )


def _named_for(source: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages, with OpenAI's older name of the system's role if the template has only that."""
    if all(message.get("role") != "developer" for message in messages) or "developer" in source:
        return messages
    return [{**message, "role": "system"} if message.get("role") == "developer" else message for message in messages]


def with_tool_prompt(
    messages: list[dict[str, Any]], tools: Tools, prompt: str | None, *, template_has_tools: bool
) -> list[dict[str, Any]]:
    """Return the messages with TGI's `tool_prompt` behind the last one that is not the assistant's. If the template has
    no tools, they are written before it."""
    if template_has_tools and not prompt:
        return messages
    text = prompt or _DEFAULT_PROMPT
    if not template_has_tools:
        text = json.dumps(tools.given, ensure_ascii=False, separators=(",", ":")) + "\n" + text
    at = next((i for i in reversed(range(len(messages))) if messages[i].get("role") != "assistant"), None)
    content = None if at is None else messages[at].get("content")
    if at is None or content is None:
        return messages
    behind = f"\n---\n{text}"
    added: Any = content + behind if isinstance(content, str) else [*content, {"type": "text", "text": behind}]
    return [*messages[:at], {**messages[at], "content": added}, *messages[at + 1 :]]


def newer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages, with calls and results of the older form (`function_call`, role `function`) in the newer
    one."""
    if all("function_call" not in message and message.get("role") != "function" for message in messages):
        return messages
    made: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        function = message.get("function_call")
        if isinstance(function, dict):
            message = {key: value for key, value in message.items() if key != "function_call"}
            message["tool_calls"] = [{"id": f"call_{i}", "type": "function", "function": function}]
        elif message.get("role") == "function":
            message = {**message, "role": "tool", "tool_call_id": f"call_{i - 1}"}
        made.append(message)
    return made


def written_out(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages for a template without calls: the assistant's calls become text, as JSON."""
    return [_written_out(message) if message.get("tool_calls") else message for message in messages]


def _written_out(message: dict[str, Any]) -> dict[str, Any]:
    texts = [message["content"]] if isinstance(message.get("content"), str) and message["content"] else []
    texts += [_text_of(call["function"]) for call in message["tool_calls"]]
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": "\n".join(texts)}


def _text_of(function: dict[str, Any]) -> str:
    """Return a call as JSON. Arguments that are not JSON, for example because they were cut off, are kept as text."""
    arguments = function.get("arguments")
    written = ""
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments.strip() or "{}")
        except msgspec.DecodeError:
            written = f'"{arguments}"'
    written = written or json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    return f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "parameters": {written}}}'
