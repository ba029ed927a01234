"""From a chat to its generation: one plan of prompt, options and reader, made without HTTP.

`plan` is the whole path: it checks the functions and the grammar of a chat, renders the prompt, makes the answer's
grammar and puts it behind the thought, and makes a reader of the answer's text.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from tokenmill.errors import GrammarError, TemplateError
from tokenmill.text import chat_thought, guided
from tokenmill.text import reasoning as thoughts
from tokenmill.text.answer_reader import AnswerReader
from tokenmill.text.chat_grammar import answer_grammar_of
from tokenmill.text.chat_prompt import render
from tokenmill.text.chat_request import Chat, ChatModel
from tokenmill.text.chat_tools import tools_of
from tokenmill.text.guided import RequestedGrammar
from tokenmill.text.options import Options
from tokenmill.text.router import format_of
from tokenmill.wire.messages import GrammarSpec

__all__ = ["Chat", "ChatModel", "ChatPlan", "check_parsers", "plan"]


class ChatPlan(NamedTuple):
    """Plan of one chat, ready for `prepare`. `prompt`: has all special tokens; `reader`: of its answers."""

    prompt: str
    options: Options
    reader: AnswerReader


def plan(chat: Chat, model: ChatModel) -> ChatPlan:
    """Check a chat and plan its answer. Takes milliseconds if messages or functions' schemas are long; compiles no
    grammar. Raises ValidationError that names the field, also ToolError and GrammarError; and TemplateError."""
    tools, requested, template = tools_of(chat), _requested_grammar(chat, model), model.tokenizer.chat_template
    if template is None:
        raise TemplateError("template not found")
    prompt = render(chat, template, tools)
    source = template.source if tools is None else template.tool_source
    if tools is not None and tools.choice == "none":
        tools = None
    calls = None if tools is None else format_of(source, model.tool_call_parser)
    form = chat_thought.reasoning_of(chat, model, source, prompt)
    answer = answer_grammar_of(model.tokenizer, tools, calls, requested, form)
    thinking = chat_thought.begun(chat, model, source, form)
    thinking, grammar = chat_thought.with_grammar(thinking, answer, chat, model.tokenizer)
    options = msgspec.structs.replace(
        chat.options,
        grammar=grammar,
        grammar_field=answer.field,
        thought=chat_thought.limited(thinking, answer, chat.options.thinking_budget, model.tokenizer),
    )
    reader = AnswerReader.of(
        model.tokenizer,
        calls,
        tools=() if tools is None else tools.allowed,
        parallel=tools is None or tools.parallel,
        held=answer.held,
        reasoning=thinking.form,
    )
    return ChatPlan(prompt + thinking.opening, options, reader)


def check_parsers(tool_call_parser: str, reasoning_parser: str) -> None:
    """Raise Unsupported if there are no parsers of these names. "", and "none" for reasoning, are always allowed."""
    format_of("", tool_call_parser)
    if reasoning_parser not in ("", "none"):
        thoughts.by_name(reasoning_parser)


def _requested_grammar(chat: Chat, model: ChatModel) -> RequestedGrammar | None:
    """Return the grammar that a chat asks for in any field; None if the answer is free. Raises ValidationError."""
    given, field = chat.options.grammar, chat.options.grammar_field
    if given is not None:
        requested = RequestedGrammar(field, given if isinstance(given, GrammarSpec) else guided.native_grammar(given))
    elif chat.guided:
        found = guided.openai_grammar(chat.guided)
        if found is None:
            return None
        requested = found
    else:
        return None
    if not model.grammars:
        raise GrammarError("grammar is not supported", requested.field)
    return requested
