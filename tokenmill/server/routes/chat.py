"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from tokenmill.errors import TemplateError, ValidationError
from tokenmill.server import answering, receipt
from tokenmill.server.call import Call
from tokenmill.server.routes.chat_answer import ChatAnswer
from tokenmill.server.routes.chat_checks import check_fields, check_messages, num_logprobs, template_fields
from tokenmill.server.routes.chat_grammar import Voice
from tokenmill.server.routes.chat_speech import Speech, speech_of
from tokenmill.server.routes.chat_tools import Tools, newer, tools_of, with_tool_prompt, written_out
from tokenmill.server.routes.openai import Envelope, check_common, grammar_of, options_of
from tokenmill.server.schema.openai import ChatRequest
from tokenmill.text import guided
from tokenmill.text.chat_template import ChatTemplate


class Prompted(NamedTuple):
    """What is to be generated for a chat, and how the answer is to be read."""

    sequences: answering.Sequences
    speech: Speech


async def chat_completions(call: Call) -> None:
    """Decode, render, prepare, answer."""
    await answer_chat(call, await call.decode(ChatRequest))


async def answer_chat(call: Call, body: ChatRequest) -> None:
    """Answer a chat that came by whatever route. The call's dialect should be "openai"."""
    sequences, speech = await prepare_chat(call, body)
    answer = ChatAnswer(Envelope(call, body, "chatcmpl-"), num_logprobs(body), speech)
    await (answering.stream if body.stream else answering.fold)(call, sequences, answer)


async def prepare_chat(call: Call, body: ChatRequest) -> Prompted:
    """Check a chat, take its permits, and make its prompt: what is to be generated for it. RequestError."""
    copies = check_common(call, body)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    options = options_of(body, max_tokens=max_tokens, logprobs=num_logprobs(body))
    tools = tools_of(body)
    wanted = await grammar_of(call, body)
    call.take(copies)
    prompt = await render(call, body, tools)
    speech = await _speech(call, body, prompt, tools, wanted)
    prompt += speech.opening
    options = msgspec.structs.replace(
        options,
        grammar=speech.grammar,
        grammar_field=speech.grammar_field,
        thought=speech.thought,
        thinking_budget=body.thinking_budget,
    )
    try:
        prepared = await call.service.prepare(
            prompt, options, "openai", stream=bool(body.stream), add_special_tokens=False
        )
    except ValidationError as error:
        error.param = _param(error, body)
        raise
    sequences = answering.Sequences(
        (prepared,),
        copies,
        keep_stop=bool(body.include_stop_str_in_output),
        num_characters=len(prompt),
        receipt=receipt.wanted(call, body.receipt),
        router=speech.router,
        shown_ids=speech.shown_ids,
    )
    return Prompted(sequences, speech)


async def _speech(
    call: Call, body: ChatRequest, prompt: str, tools: Tools | None, wanted: guided.Wanted | None
) -> Speech:
    model, _, _ = call.service.ready()
    template, options = model.tokenizer.chat_template, call.service.options
    assert template is not None  # it made the prompt
    source = template.source if tools is None else template.tool_source
    voice = Voice(model.tokenizer, source, options.tool_call_parser, options.reasoning_parser)
    return await call.work(lambda: speech_of(voice, body, prompt, tools, wanted))


async def render(call: Call, body: ChatRequest, tools: Tools | None) -> str:
    """The prompt that the model's chat template makes of a chat. ValidationError, TemplateError."""
    check_fields(body)
    model, _, _ = call.service.ready()
    template = model.tokenizer.chat_template
    if template is None:
        raise TemplateError("template not found")
    return await call.work(lambda: _rendered(template, body, tools))


def _rendered(template: ChatTemplate, body: ChatRequest, tools: Tools | None) -> str:
    check_messages(body.messages)
    told = tools if tools is not None and tools.choice != "none" else None
    source = template.source if told is None else template.tool_source
    kwargs = {**template_fields(body, source), **(body.chat_template_kwargs or {})}
    messages = _named_for(source, newer(body.messages))
    begins = body.add_generation_prompt
    if messages[-1].get("tool_calls") and not body.continue_final_message and begins is None:
        begins = True  # a call is whole, also where it is written out as text
    if "tool_calls" not in source:
        messages = written_out(messages)
    if told is not None:
        messages = with_tool_prompt(messages, told, body.tool_prompt, template_knows=template.shows_tools)
    return template.render(
        messages,
        tools=told.given if told is not None and template.shows_tools else None,
        documents=body.documents,
        add_generation_prompt=begins,
        continue_final_message=body.continue_final_message,
        kwargs=kwargs,
    )


def _param(error: ValidationError, body: ChatRequest) -> str | None:
    """The field of a chat that a rule about prompts and tokens is about."""
    if error.param in (None, "prompt"):
        return "messages"
    if error.param == "max_tokens" and body.max_completion_tokens is not None:
        return "max_completion_tokens"
    return error.param


def _named_for(source: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages; OpenAI's newer name of the system's role becomes the older where the template knows only that."""
    if all(message.get("role") != "developer" for message in messages) or "developer" in source:
        return messages
    return [{**message, "role": "system"} if message.get("role") == "developer" else message for message in messages]
