"""What shape of messages a chat template can take, read from its syntax.

OpenAI's API sends a message's content as text or as a list of parts, and a tool call's arguments as JSON text.
Templates were written for one or the other, and most say nothing when they are given the wrong one: they print a Python
list, or JSON inside of JSON.
"""

from __future__ import annotations

from typing import Any

import msgspec
from jinja2 import nodes

_OBJECT_FILTERS = frozenset({"tojson", "items", "dictsort"})


class Wants(msgspec.Struct, frozen=True):
    """`content_lists`: the template walks over the parts of a content. `argument_objects`: it writes or walks over a
    tool call's arguments as an object, and does not ask first whether they are text."""

    content_lists: bool
    argument_objects: bool


def wants_of(tree: nodes.Template) -> Wants:
    """Read a parsed template."""
    content, arguments = _Mentions(tree, "content"), _Mentions(tree, "arguments")
    loops = list(tree.find_all(nodes.For))
    objects = (
        any(node.name in _OBJECT_FILTERS and arguments.has(node.node) for node in tree.find_all(nodes.Filter))
        or any(_calls_items(node) and arguments.has(node) for node in tree.find_all(nodes.Call))
        or any(arguments.has(loop.iter) for loop in loops)
    )
    asks = any(node.name in ("string", "mapping") and arguments.has(node.node) for node in tree.find_all(nodes.Test))
    return Wants(
        content_lists=any(content.has(loop.iter) for loop in loops) or _indexes_content(tree, content),
        argument_objects=objects and not asks,
    )


class _Mentions:
    """Finds expressions that are a field of this name, or a variable that was set to one."""

    def __init__(self, tree: nodes.Template, field: str) -> None:
        self.field = field
        self.names: set[str] = set()
        for assign in tree.find_all(nodes.Assign):
            if isinstance(assign.target, nodes.Name) and self.has(assign.node):
                self.names.add(assign.target.name)

    def has(self, node: nodes.Node | None) -> bool:
        """True if the value of `node` is the field's, but for filters, slices and methods on it."""
        if isinstance(node, nodes.Name):
            return node.name in self.names
        if isinstance(node, nodes.Getattr):
            return node.attr == self.field or self.has(node.node)
        if isinstance(node, nodes.Getitem):
            named = _constant(node.arg) == self.field
            return named or (isinstance(node.arg, nodes.Slice) and self.has(node.node))
        if isinstance(node, nodes.Filter | nodes.Call):
            return self.has(node.node)
        if isinstance(node, nodes.CondExpr):
            return self.has(node.expr1) or self.has(node.expr2)
        return False


def _calls_items(call: nodes.Call) -> bool:
    return isinstance(call.node, nodes.Getattr) and call.node.attr == "items"


def _indexes_content(tree: nodes.Template, content: _Mentions) -> bool:
    """`message.content[0].text`, as some templates write that never loop."""
    parts = [node.node for node in tree.find_all(nodes.Getattr) if node.attr == "text"]
    parts += [node.node for node in tree.find_all(nodes.Getitem) if _constant(node.arg) == "text"]
    return any(
        isinstance(part, nodes.Getitem) and _constant(part.arg) == 0 and content.has(part.node) for part in parts
    )


def _constant(node: nodes.Node) -> Any:
    return node.value if isinstance(node, nodes.Const) else None
