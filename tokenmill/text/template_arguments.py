"""Reads from a chat template's syntax whether it takes a tool call's arguments as an object.

OpenAI's API sends them as JSON text. Templates were written for one or the other, and most do not fail if they get the
wrong one: they print JSON inside of JSON. `transformers` leaves the choice to its caller.
"""

from __future__ import annotations

from typing import Any

from jinja2 import nodes

_OBJECT_FILTERS = frozenset({"tojson", "items", "dictsort"})


def takes_argument_objects(tree: nodes.Template) -> bool:
    """Return True if a parsed template writes or iterates over arguments as an object, and does not test first whether
    they are text."""
    arguments = _Mentions(tree, "arguments")
    objects = (
        any(node.name in _OBJECT_FILTERS and arguments.has(node.node) for node in tree.find_all(nodes.Filter))
        or any(_calls_items(node) and arguments.has(node) for node in tree.find_all(nodes.Call))
        or any(arguments.has(loop.iter) for loop in tree.find_all(nodes.For))
    )
    asks = any(node.name in ("string", "mapping") and arguments.has(node.node) for node in tree.find_all(nodes.Test))
    return objects and not asks


class _Mentions:
    """Search for expressions that are a field of this name, or a variable that was set to one."""

    def __init__(self, tree: nodes.Template, field: str) -> None:
        self.field = field
        self.names: set[str] = set()
        for assign in tree.find_all(nodes.Assign):
            if isinstance(assign.target, nodes.Name) and self.has(assign.node):
                self.names.add(assign.target.name)

    def has(self, node: nodes.Node | None) -> bool:
        """Return True if the value of `node` is the field's, apart from filters, slices and methods on it."""
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


def _constant(node: nodes.Node) -> Any:
    return node.value if isinstance(node, nodes.Const) else None
