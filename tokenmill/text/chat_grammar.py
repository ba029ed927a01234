"""The grammar of a chat's answer, from its tools and from the grammar that its client asks for.

If the answer must be calls, the grammar has calls alone. If it may have some, text is free, and the calls of strict
functions are constrained. If it must follow a client's grammar, it is either calls or that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tokenmill.errors import GrammarError, ToolError
from tokenmill.grammar.patterns import PatternError, literal, rewrite
from tokenmill.text.chat_tools import Tools
from tokenmill.text.functions import is_strict, resolved, types_of
from tokenmill.text.guided import RequestedGrammar, json_grammar
from tokenmill.text.lark import SPACES, slashed
from tokenmill.text.machine import Held
from tokenmill.text.reasoning import ReasoningFormat
from tokenmill.text.tokenizer import Tokenizer, fixed_ids, special_ids
from tokenmill.text.tools.base import GrammarRequest, ToolFormat
from tokenmill.wire.messages import GrammarSpec

_NO_PARAMETERS = {"type": "object", "properties": {}}  # OpenAI's meaning of a function without parameters
_MOST_DEPTH = 8


class AnswerGrammar(NamedTuple):
    """The grammar of an answer; None: it is free. `field`: the request's field that asked for it. `held`: see
    `new_router`. `waits`: the grammar begins behind the beginning of a call, wherever that is. `calls`: calls alone."""

    grammar: GrammarSpec | None = None
    field: str = ""
    held: Held = ""
    waits: bool = False
    calls: bool = False

    @property
    def with_calls(self) -> bool:
        """True if the grammar has calls in it."""
        return self.calls or bool(self.held)


def answer_grammar_of(
    tokenizer: Tokenizer,
    tools: Tools | None,
    form: ToolFormat | None,
    requested: RequestedGrammar | None,
    reasoning: ReasoningFormat | None,
) -> AnswerGrammar:
    """Return the grammar of an answer that may call `tools`, written in the format `form`, with thoughts marked as in
    `reasoning`. Raises GrammarError, ToolError for grammars that are not supported."""
    if tools is None or form is None:
        return AnswerGrammar(requested.grammar, requested.field) if requested else AnswerGrammar()
    free = not tools.forced and not tools.restricted
    if free and requested is None and not any(map(is_strict, tools.given)):
        return AnswerGrammar()
    spoken = reasoning.markers if reasoning else ()
    request = GrammarRequest(
        [_exact(tool, f"tools[{i}].function.parameters", forced=tools.forced)
         for i, tool in enumerate(tools.given) if tool in tools.allowed],
        "calls" if tools.forced else "answer",
        parallel=tools.parallel and tools.choice != "function",
        special_ids=special_ids(tokenizer, (*form.markers, *spoken)),
        spoken=spoken,
    )  # fmt: skip
    if tools.forced:
        return AnswerGrammar(GrammarSpec("lark", form.grammar(request)), "tool_choice", "calls", calls=True)
    if requested is not None:
        instead = _instead(form, tools, requested)
        source = form.grammar(request._replace(extent="choice", instead=instead))
        return AnswerGrammar(GrammarSpec("lark", source), requested.field, "choice")
    trigger = fixed_ids(tokenizer, form.trigger) if form.trigger and not form.bare else None
    field = "tool_choice" if tools.restricted else "tools"
    if trigger is None:
        return AnswerGrammar(GrammarSpec("lark", form.grammar(request)), field, "answer")
    source = form.grammar(request._replace(extent="behind"))
    return AnswerGrammar(GrammarSpec("lark", source, (trigger,)), field, "answer", waits=True)


def _exact(tool: Mapping[str, Any], param: str, *, forced: bool) -> dict[str, Any]:
    """Return a tool with the schema of its arguments in canonical form. Raises GrammarError if it cannot be enforced
    exactly."""
    if not (forced or is_strict(tool)):
        return dict(tool)
    function = tool["function"]
    parameters = {"type": "object", **(function.get("parameters") or _NO_PARAMETERS)}
    return {**tool, "function": {**function, "parameters": _lark_schema(json_grammar(parameters, param).source)}}


def _instead(form: ToolFormat, tools: Tools, requested: RequestedGrammar) -> str:
    """Return the rules of an answer that is not calls. Raises ToolError if it could not be distinguished from calls."""
    schema = json.loads(requested.grammar.source) if requested.grammar.kind == "json_schema" else None
    rules = as_lark(requested.grammar, "instead", without=form.starts)
    if rules is None or (form.bare and schema is None):
        raise ToolError(
            f"`{requested.field}` cannot stand beside `tools` here, for such an answer cannot be told from a call. Use "
            "a JSON schema, or send one of the two",
            requested.field,
        )
    like_a_call = "{" in form.bare and _may_have("name", schema, schema)
    like_a_call = like_a_call and any(_may_have(key, schema, schema) for key in ("arguments", "parameters"))
    if like_a_call and any(map(is_strict, tools.given)):
        raise ToolError(
            f"`{requested.field}` cannot stand beside strict functions here: in this model's tool format an object "
            "with `name` and `parameters` is a call. Let its schema have other keys",
            requested.field,
        )
    return rules


def _may_have(key: str, schema: Any, root: Any, depth: int = 0) -> bool:
    """Return True if a value that fits a schema may be an object with this key, or if that is not certain."""
    if not isinstance(schema, dict) or depth > _MOST_DEPTH:
        return schema is not False
    if "$ref" in schema:
        return _may_have(key, resolved(schema["$ref"], root), root, depth + 1)
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            return any(_may_have(key, one, root, depth + 1) for one in schema[keyword])
    if "object" not in types_of(schema, root):
        return False
    named = key in schema.get("properties", {}) or "patternProperties" in schema
    return named or schema.get("additionalProperties", True) is not False


def as_lark(grammar: GrammarSpec, name: str, without: Iterable[str] = ()) -> str | None:
    """Return rules in Lark in which `name` is the client's grammar; None for a client's own Lark, because its names
    might collide. `without`: texts that only JSON may begin with."""
    source = grammar.source
    if grammar.kind == "json_schema":
        return f"{name}: %json {json.dumps(_lark_schema(source), ensure_ascii=False)}\n"
    if grammar.kind == "choice":
        pattern = "|".join(map(literal, json.loads(source)))
    elif grammar.kind == "regex":
        try:
            pattern = slashed(rewrite(source, search=False).text)
        except PatternError as error:
            raise GrammarError(f"The regular expression cannot be used: {error}.") from None
    else:
        return None
    barred = "|".join(map(literal, without))
    but = f" & ~/{SPACES}({barred})(?s:.*)/" if barred else ""
    return f"{name}: {name.upper()}_TEXT\n{name.upper()}_TEXT: /{pattern}/{but}\n"


def renamed(source: str, name: str) -> str:
    """Return a grammar with its rule `start` under another name."""
    return re.sub(r"(?m)^start:", f"{name}:", source, count=1)


def _lark_schema(canonical: str) -> Any:
    """Return a canonical schema as it is written behind %json, with the options of all schemas."""
    from tokenmill.grammar.llguidance import lark_json

    return json.loads(lark_json(canonical))
