"""How a chat's answer speaks: where its thoughts and calls are in its text, and which grammar makes it keep to that.

A grammar is for the answer, not for the thought before it. If the prompt ends inside of a thought, the grammar begins
behind its end; if the model may open one itself, the thought becomes the optional beginning of the grammar. A thought
whose end could not be told by tokens is closed in the prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from tokenmill.errors import GrammarError
from tokenmill.grammar.patterns import PatternError, rewrite
from tokenmill.server.routes.chat_checks import asks_to_think
from tokenmill.server.routes.chat_tools import Tools
from tokenmill.server.routes.openai import refuse
from tokenmill.server.schema.openai import ChatRequest
from tokenmill.text import reasoning as thoughts
from tokenmill.text.guided import Wanted, json_grammar
from tokenmill.text.prepare import Thought
from tokenmill.text.reasoning import ReasoningFormat
from tokenmill.text.router import Router, format_of, router_of
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.text.tools._lark import Lark
from tokenmill.wire.messages import GrammarSpec

_NO_PARAMETERS = {"type": "object", "properties": {}}  # what OpenAI takes a function without any for


class Speech(NamedTuple):
    """What a chat's answer is made to be, and how its text is read."""

    router: Callable[[], Router] | None = None  # makes one for a choice; None: all text is content
    thinks: bool = False  # the usage tells tokens of reasoning
    older: bool = False  # calls are told as `function_call`
    opening: str = ""  # comes behind the prompt
    grammar: GrammarSpec | None = None
    grammar_field: str = ""
    thought: Thought | None = None
    shown_ids: frozenset[int] = frozenset()  # special tokens that the router reads


class Voice(NamedTuple):
    """What a model and its server say of speech: the template's text, and the parsers that were chosen, "" if none."""

    tokenizer: Tokenizer
    template: str
    tool_call_parser: str
    reasoning_parser: str


def check_parsers(tool_call_parser: str, reasoning_parser: str) -> None:
    """Unsupported if there are none of these names; "" is always fine, and so is no reasoning at all, "none"."""
    format_of("", tool_call_parser)
    if reasoning_parser not in ("", "none"):
        thoughts.by_name(reasoning_parser)


def speech_of(voice: Voice, body: ChatRequest, prompt: str, tools: Tools | None, wanted: Wanted | None) -> Speech:
    """The speech of an answer to a prompt. ValidationError, GrammarError. Compiles nothing, but may take milliseconds
    where functions have long schemas."""
    form = _reasoning(voice, body, prompt)
    if tools is not None and tools.choice == "none":
        tools = None
    grammar, field, trigger_ids = _grammar(voice, tools, wanted)
    thinking = _Thinking(voice, form, body, calls=tools is not None)
    if grammar is not None:
        grammar = msgspec.structs.replace(grammar, after=(trigger_ids,)) if trigger_ids else thinking.before(grammar)
    thought = thinking.limited(constrained=grammar is not None and not trigger_ids)
    form = thinking.form
    if form is None and tools is None:
        return Speech(None, False, False, thinking.opening, grammar, field, thought)

    def router() -> Router:
        return router_of(
            voice.template,
            tools=tools.given if tools else (),
            parallel=tools is None or tools.parallel,
            parser=voice.tool_call_parser,
            reasoning=form,
        )

    shown = frozenset(_special_ids(voice.tokenizer, router().markers).values())
    older = tools is not None and tools.older
    return Speech(router, form is not None, older, thinking.opening, grammar, field, thought, shown)


def _reasoning(voice: Voice, body: ChatRequest, prompt: str) -> ReasoningFormat | None:
    """How the answer may think; None if it does not."""
    if voice.reasoning_parser == "none":
        return None
    form = thoughts.reasoning_of(voice.template, prompt, voice.reasoning_parser)
    if form is None or form.channels or form.already_open:
        return form
    last = body.messages[-1]
    said = last.get("content")
    if last.get("role") == "assistant" and isinstance(said, str) and prompt.rstrip().endswith(said.rstrip()):
        unfinished = said.rfind(form.start) > said.rfind(form.end)  # and the answer goes on with it
        return msgspec.structs.replace(form, already_open=unfinished)
    return form


class _Thinking:
    """How long a thought may be and what comes behind it. `form` and `opening`: what the answer may think, and what is
    put behind the prompt for that; both may change with what is asked."""

    def __init__(self, voice: Voice, form: ReasoningFormat | None, body: ChatRequest, *, calls: bool) -> None:
        self._voice, self.form, self._calls = voice, form, calls
        self.opening = ""
        self._budget, self._asked = body.thinking_budget, asks_to_think(body)
        if self._budget is None:
            return
        if form is None and self._never_thinks():
            raise refuse("thinking_budget", "the model does not think, or not in a form that is known here")
        if form is not None and not form.channels:
            if not form.already_open:
                self._open(form)
            if self._budget == 0:
                self._close(form)

    def before(self, grammar: GrammarSpec) -> GrammarSpec:
        """A grammar of the answer alone, made to hold behind the thought."""
        form = self.form
        if form is None:
            return grammar
        if self._asked and not form.already_open and not form.channels:
            form = self._open(form)
        if not form.already_open:
            return self._optional(form, grammar)
        ends = self._end_ids(form)
        if ends is None:
            self._close(form)
            return grammar
        return msgspec.structs.replace(grammar, after=(ends,))

    def limited(self, *, constrained: bool) -> Thought | None:
        """How the thought is ended when its budget is spent. `constrained`: a grammar begins right behind its end."""
        form = self.form
        if not self._budget or form is None:
            return None
        ends = self._end_ids(form)
        if ends is None:
            raise refuse("thinking_budget", "the end of the model's thoughts is no token of its own")
        encode = self._voice.tokenizer.encode
        forced = encode(form.closing.rstrip() if constrained else form.closing, False)
        calls = (tuple(encode("<|channel|>commentary", False)),) if form.channels else ()
        return Thought(self._budget, tuple(forced), (ends, *calls))

    def _never_thinks(self) -> bool:
        parser = self._voice.reasoning_parser
        return parser == "none" or (not parser and thoughts.of_template(self._voice.template) is None)

    def _open(self, form: ReasoningFormat) -> ReasoningFormat:
        self.opening = form.start + "\n"
        self.form = msgspec.structs.replace(form, already_open=True)
        return self.form

    def _close(self, form: ReasoningFormat) -> None:
        self.opening += form.closing
        self.form = None

    def _end_ids(self, form: ReasoningFormat) -> tuple[int, ...] | None:
        return fixed_ids(self._voice.tokenizer, form.answer)

    def _optional(self, form: ReasoningFormat, grammar: GrammarSpec) -> GrammarSpec:
        """The grammar with a thought before it, if the model likes."""
        body = _as_lark(grammar, calls=self._calls)
        if body is None:  # a grammar of the client's own: it says itself what may come
            return grammar
        end = form.closing if form.channels else form.end
        texts = [form.start, end, form.answer]
        special = _special_ids(self._voice.tokenizer, re.findall(r"<\|[^|]*\|>", "".join(texts)) + texts)
        lark = Lark(special)
        until = lark.free_until("thought_rest", end)
        lark.rule("thought", f"{lark.text(form.start)} {until}")
        if form.channels:
            lark.rule("headed", lark.text(form.answer))
            lark.rule("start", "(thought | headed) answer")
        else:
            lark.rule("THOUGHT_SPACE", r"/[ \n]{0,3}/")
            lark.rule("start", "(thought THOUGHT_SPACE)? answer")
        return GrammarSpec("lark", lark.source() + body)


def _grammar(
    voice: Voice, tools: Tools | None, wanted: Wanted | None
) -> tuple[GrammarSpec | None, str, tuple[int, ...]]:
    """The grammar of the answer, the field that asked for it, and the tokens behind which it begins, if it waits for
    a call."""
    if tools is None:
        return (wanted.grammar, wanted.field, ()) if wanted else (None, "", ())
    strict = any(tool["function"].get("strict") for tool in tools.given)
    if not tools.forced and not strict:
        return None, "", ()
    form = format_of(voice.template, voice.tool_call_parser)
    trigger_ids: tuple[int, ...] = ()
    if not tools.forced and form.trigger:
        found = fixed_ids(voice.tokenizer, form.trigger)
        if found is None:  # where a call begins cannot be told by tokens: `strict` holds only where a call is forced
            return None, "", ()
        trigger_ids = found
    held = [_exact(tool, f"tools[{i}].function.parameters", forced=tools.forced)
            for i, tool in enumerate(tools.given) if tool in tools.allowed]  # fmt: skip
    kind, source = form.grammar(
        held, "required" if tools.forced else "auto", tools.parallel and tools.choice != "function",
        _special_ids(voice.tokenizer, form.markers),
    )  # fmt: skip
    return GrammarSpec(kind, source), "tool_choice" if tools.forced else "tools", trigger_ids


def _exact(tool: Mapping[str, Any], param: str, *, forced: bool) -> dict[str, Any]:
    """A tool whose arguments' schema is as a grammar wants it. GrammarError for what cannot be served exactly."""
    function = tool["function"]
    if not (forced or function.get("strict")):
        return dict(tool)
    parameters = function.get("parameters") or _NO_PARAMETERS
    return {**tool, "function": {**function, "parameters": _lark_schema(json_grammar(parameters, param).source)}}


def _lark_schema(canonical: str) -> Any:
    """A canonical schema as it stands behind %json, with the options that all schemas have."""
    from tokenmill.grammar.llguidance import lark_json

    return json.loads(lark_json(canonical))


def _as_lark(grammar: GrammarSpec, *, calls: bool) -> str | None:
    """Rules in Lark of which `answer` is the grammar, one of `calls` or what a client asked for; None for a client's
    own Lark, whose names might be ours."""
    source = grammar.source
    if grammar.kind == "json_schema":
        return f"answer: %json {json.dumps(_lark_schema(source), ensure_ascii=False)}\n"
    if grammar.kind == "choice":
        return "answer: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in json.loads(source)) + "\n"
    if grammar.kind == "regex":
        try:
            return f"answer: ANSWER_TEXT\nANSWER_TEXT: /{_slashed(rewrite(source, search=False).text)}/\n"
        except PatternError as error:
            raise GrammarError(f"The regular expression cannot be used: {error}.") from None
    return re.sub(r"(?m)^start:", "answer:", source, count=1) if calls else None


def _slashed(pattern: str) -> str:
    """A regular expression as it stands between slashes."""
    return re.sub(r"\\.|/", lambda found: "\\/" if found.group() == "/" else found.group(), pattern, flags=re.DOTALL)


def fixed_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...] | None:
    """The tokens that always stand for a text, whatever is around it; None if it may be cut otherwise."""
    ids = tokenizer.encode(text, False)
    fixed = len(ids) == 1 or (bool(ids) and tokenizer.is_special(ids[0]) and tokenizer.is_special(ids[-1]))
    return tuple(ids) if fixed else None


def _special_ids(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, int]:
    """Those of the texts that are special tokens."""
    found = ((text, tokenizer.token_id(text)) for text in texts)
    return {text: i for text, i in found if i is not None and tokenizer.is_special(i)}
