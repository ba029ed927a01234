"""The tools of a chat, checked: OpenAI's form, its older one, and TGI's become one."""

from __future__ import annotations

from typing import Any, NamedTuple

from tokenmill.errors import ToolError
from tokenmill.text.chat_request import Chat
from tokenmill.text.limits import MAX_TOOL_NAME, MAX_TOOLS, not_supported, shown

_MODES = ("auto", "none", "required")


class Tools(NamedTuple):
    """The tools of a request, at least one. `given`: all of them, in OpenAI's newer form, as the model sees them.
    `names`: of those that it may call, if not all."""

    given: list[dict[str, Any]]
    choice: str  # "auto", "none", "required", or the function that must be called, as "function"
    names: tuple[str, ...] = ()
    parallel: bool = True  # an answer may have several calls
    older: bool = False  # requested as `functions`: the answer has a `function_call`

    @property
    def forced(self) -> bool:
        """True if the answer must be a call."""
        return self.choice in ("required", "function")

    @property
    def allowed(self) -> list[dict[str, Any]]:
        """The functions that the answer may call."""
        if self.choice == "none":
            return []
        return [tool for tool in self.given if not self.names or tool["function"]["name"] in self.names]

    @property
    def restricted(self) -> bool:
        """True if the prompt shows functions that the model may not call."""
        return len(self.allowed) < len(self.given)


def tools_of(chat: Chat) -> Tools | None:
    """Return the tools that a request has, checked; None if none. Raises ToolError, ValidationError that name the
    field."""
    if chat.functions:
        return _older(chat)
    if chat.function_call not in (None, "none", "auto"):
        raise ToolError("`function_call` is only allowed with `functions`", "function_call")
    if not chat.tools:
        if chat.tool_choice not in (None, "none", "auto"):
            raise ToolError("`tool_choice` is only allowed with `tools`", "tool_choice")
        return None
    given = _checked(chat.tools, "tools")
    choice, names = _choice(chat.tool_choice, given)
    return Tools(given, choice, names, chat.parallel_tool_calls is not False)


def _older(chat: Chat) -> Tools:
    """Return the tools of `functions` and `function_call`."""
    if chat.tools:
        raise ToolError("`functions` is the older form of `tools`: send only one of them", "functions")
    given = _checked([{"type": "function", "function": function} for function in chat.functions or ()], "functions")
    requested = chat.function_call
    if isinstance(requested, dict):
        return Tools(given, "function", (_known(requested.get("name"), given, "function_call"),), False, True)
    if requested not in (None, "auto", "none"):
        raise ToolError(
            "Invalid 'function_call': it must be 'auto', 'none' or an object with a `name`. "
            f"Given: {shown(requested)!r}",
            "function_call",
        )
    return Tools(given, requested or "auto", (), False, True)


def _choice(requested: Any, given: list[dict[str, Any]]) -> tuple[str, tuple[str, ...]]:
    """Return the choice, and the names of the functions that it is among, () for all."""
    if requested is None:
        return "auto", ()
    if isinstance(requested, str):
        return (requested, ()) if requested in _MODES else ("function", (_known(requested, given, "tool_choice"),))
    kind = requested.get("type", "function")
    if kind == "allowed_tools":
        return _allowed(requested.get(kind, requested), given)
    if kind != "function":
        raise not_supported("tool_choice", f"its type must be 'function' or 'allowed_tools'. Given: {shown(kind)!r}")
    return "function", (_known(_name_in(requested), given, "tool_choice"),)


def _allowed(requested: Any, given: list[dict[str, Any]]) -> tuple[str, tuple[str, ...]]:
    """Return the mode of OpenAI's `allowed_tools`, and the names of the functions that it is among."""
    mode, tools = (requested.get("mode"), requested.get("tools")) if isinstance(requested, dict) else (None, None)
    if mode not in ("auto", "required") or not isinstance(tools, list) or not tools:
        allowed = "its `allowed_tools` must have a `mode`, 'auto' or 'required', and `tools`, a list of functions"
        raise ToolError(f"Invalid 'tool_choice': {allowed}", "tool_choice")
    return mode, tuple(_known(_name_in(tool), given, "tool_choice") for tool in tools)


def _name_in(tool: Any) -> Any:
    """Return the name in {"type": "function", "function": {"name"}}, or without the inner object; None if there is
    none."""
    if not isinstance(tool, dict) or tool.get("type", "function") != "function":
        return None
    function = tool.get("function", tool)
    return function.get("name") if isinstance(function, dict) else None


def _known(name: Any, given: list[dict[str, Any]], param: str) -> str:
    if not isinstance(name, str):
        raise ToolError(f"Invalid '{param}': it must have the `name` of a function", param)
    if all(tool["function"]["name"] != name for tool in given):
        raise ToolError(f"Tool with name {shown(name)} not found", param)
    return name


def _checked(tools: list[Any], field: str) -> list[dict[str, Any]]:
    if len(tools) > MAX_TOOLS:
        raise ToolError(f"Invalid '{field}': it may have up to {MAX_TOOLS} functions. Given: {len(tools)}", field)
    given = [_tool(tool, f"{field}[{i}]") for i, tool in enumerate(tools)]
    names: set[str] = set()
    for i, tool in enumerate(given):
        name = tool["function"]["name"]
        if name in names:
            raise ToolError(f"Invalid '{field}[{i}]': there are two functions named {shown(name)!r}", f"{field}[{i}]")
        names.add(name)
    return given


def _tool(tool: Any, where: str) -> dict[str, Any]:
    """Return one tool. TGI's name of `parameters`, `arguments`, becomes OpenAI's."""
    if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
        raise ToolError(f"Invalid '{where}': it must be an object with a `function`", where)
    if tool.get("type", "function") != "function":
        raise not_supported(where, f"its type must be 'function'. Given: {shown(tool.get('type'))!r}")
    function: dict[str, Any] = tool["function"]
    name = function.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_TOOL_NAME:
        raise ToolError(f"Invalid '{where}': its name must be a text of 1 to {MAX_TOOL_NAME} characters", where)
    if not isinstance(function.get("description"), str | None):
        raise ToolError(f"Invalid '{where}': its description must be a text", where)
    if "parameters" not in function and "arguments" in function:
        function = {("parameters" if key == "arguments" else key): value for key, value in function.items()}
    if not isinstance(function.get("parameters"), dict | None):
        raise ToolError(f"Invalid '{where}': its parameters must be a JSON schema", where)
    if not isinstance(function.get("strict"), bool | None):
        raise ToolError(f"Invalid '{where}': its `strict` must be true or false", where)
    return {"type": "function", **tool, "function": function}
