"""Jinja as `transformers` sets it up, inside a sandbox that ends templates which run or grow without end.

The sandbox hides Python's internals from templates. Each rendering has a new budget, which every turn of a loop, every
macro and every call charges, so any template ends within seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from time import thread_time
from typing import Any, cast

from jinja2 import TemplateError, Undefined, UndefinedError, nodes
from jinja2.environment import Template
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import missing
from jinja2.visitor import NodeTransformer

from tokenmill.text import growth

MAX_SECONDS = 5.0  # CPU time of the thread, so that a busy machine causes no failure
_BUDGET = "_tokenmill_budget"  # read from the given variables, so that a template cannot replace it
_MAX_INDENT = 80
_CHECK_EVERY = 16  # charges between two reads of the clock, which are system calls


class Budget:
    """Remaining time of one rendering."""

    __slots__ = ("_charges", "_ends", "_seconds")

    def __init__(self, seconds: float) -> None:
        self._charges, self._seconds = 0, seconds
        self._ends = thread_time() + seconds

    def charge(self) -> None:
        """Count one step. Raises Refused once the time is over."""
        self._charges += 1
        if self._charges % _CHECK_EVERY == 0 and thread_time() > self._ends:
            raise growth.Refused(f"the chat template takes longer than {self._seconds:g} s for these messages")


def environment() -> ImmutableSandboxedEnvironment:
    """Return an environment that renders as `transformers` does. Make one for each set of templates."""
    made = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Charger, _Generation, loopcontrols],
        finalize=growth.check_tree,
        undefined=_Missing,
    )
    made.filters |= growth.guarded(made.filters)
    made.filters["tojson"] = _tojson
    made.filters["center"] = _center
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = _strftime_now
    del made.globals["lipsum"]  # endless text
    return made


def run(template: Template, variables: Mapping[str, Any], seconds: float | None = None) -> str:
    """Render within a new budget, of MAX_SECONDS if None. Raises Jinja's errors, and those of the template's
    objects."""
    out: list[str] = []
    size = 0
    for part in template.generate({**variables, _BUDGET: Budget(MAX_SECONDS if seconds is None else seconds)}):
        size += len(part)
        growth.check_size(size)
        out.append(part)
    return "".join(out)


def reason(error: TemplateError) -> str:
    """Return why a rendering ended: the template's message or this server's; of Jinja's own errors the kind alone."""
    ours = isinstance(error, growth.Refused | UndefinedError) or type(error) is TemplateError
    return (error.message if ours else "") or f"the chat template fails with {type(error).__name__}"


class _Missing(Undefined):
    """Undefined value of a template, with a message of this server's for its use."""

    @property
    def _undefined_message(self) -> str:
        if isinstance(self._undefined_hint, _Hint):
            return self._undefined_hint
        name: Any = self._undefined_name  # of a list: a number
        if name is None:
            return "a value is used that is not there"
        if self._undefined_obj is missing:
            return f"{name!r} is not defined"
        owner = _KINDS.get(type(self._undefined_obj), type(self._undefined_obj).__name__)
        return f"{owner} has no {'element ' if isinstance(name, int) else ''}{name!r}"


class _Hint(str):
    """A message of this server's about an undefined value."""

    __slots__ = ()


_KINDS: dict[type, str] = {
    dict: "an object", list: "a list", tuple: "a list", str: "a text", int: "a number", float: "a number",
    bool: "a truth value", type(None): "null",
}  # fmt: skip


class _Environment(ImmutableSandboxedEnvironment):
    """Environment that charges turns of loops and macros, and refuses to build values that would fill the memory."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        bodies = [(node.body, node.lineno) for node in tree.find_all(nodes.For)]
        bodies += [(node.body, node.lineno) for node in tree.find_all(nodes.Macro)]
        bodies += [(node.body, node.lineno) for node in tree.find_all(nodes.CallBlock)]
        for body, lineno in bodies:
            body.insert(0, nodes.ExprStmt(_call("charge", [nodes.ContextReference()]), lineno=lineno))
        rewritten = _Joins().visit(tree)
        rewritten.set_environment(self)
        return cast(nodes.Template, rewritten)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Return the undefined value for an attribute that templates must not read."""
        hint = _Hint(f"a chat template may not read {attribute!r}")
        return self.undefined(hint, name=attribute, obj=obj, exc=SecurityError)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Return the result of an operator, after a check of its size."""
        growth.check_arithmetic(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call an object, unless the time is over or the result would be too large."""
        _charge(__context)
        return super().call(__context, __obj, *growth.check_call(__obj, args, kwargs), **kwargs)


class _Joins(NodeTransformer):
    """Replaces `~` by a call, because Jinja has no hook for it."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        """Replace one `~`, and those in its parts."""
        self.generic_visit(node)
        return _call("join", node.nodes, node.lineno)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, which marks an answer for training and has no effect on rendering."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Return the statements between the tags, in a scope of their own, as in transformers."""
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(lineno)

    def _inside(self, caller: Callable[[], str]) -> str:
        return caller()


class _Charger(Extension):
    """Functions that rewritten templates call. They are an extension's methods, which a template cannot replace."""

    def charge(self, context: Context) -> str:
        """Charge one step of the budget."""
        _charge(context)
        return ""

    def join(self, *parts: Any) -> str:
        """Return the result of Jinja's `~`, after a check of its size."""
        texts = [str(growth.check_tree(part)) for part in parts]
        growth.check_size(sum(map(len, texts)))
        return "".join(texts)


def _call(name: str, arguments: list[nodes.Expr], lineno: int = 0) -> nodes.Call:
    method = nodes.ExtensionAttribute(_Charger.identifier, name)
    return nodes.Call(method, arguments, [], None, None, lineno=lineno)


def _charge(context: Context) -> None:
    budget = context.parent.get(_BUDGET)
    if isinstance(budget, Budget):
        budget.charge()


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return plain JSON, because Jinja's own filter escapes HTML."""
    growth.check_tree(value)
    if isinstance(indent, int) and indent > _MAX_INDENT:
        raise growth.Refused(f"a chat template may not indent JSON by {indent}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _center(value: str, width: int = 80) -> str:
    growth.check_size(width)
    return str(value).center(width)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
