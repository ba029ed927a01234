"""Byte-level models with several kinds of chat templates, chat plans with them, and checks against their grammars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support_grammar import made as compiled
from support_server import byte_model

from tokenmill.grammar.base import Vocabulary
from tokenmill.grammar.llguidance import LLGuidance
from tokenmill.text.chat import Chat, ChatModel, ChatPlan, plan
from tokenmill.text.limits import GRAMMAR_FIELDS
from tokenmill.text.load import load_tokenizer
from tokenmill.text.options import Options
from tokenmill.weights.source import local_source
from tokenmill.wire.messages import GrammarSpec

USER = [{"role": "user", "content": "hi"}]
CHAT = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}</s>{% endfor %}"
ASKS = (  # as Qwen 3: the model reasons by default
    CHAT + "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
OPENS = CHAT + "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}{# </think> #}"
HARMONY = CHAT + "{% if add_generation_prompt %}<|start|>assistant{% endif %}{# <|channel|> <|message|> #}"
MARKS = ("<think>", "</think>")
CHANNELS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>")
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
FORMAT = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}
STRICT = {"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": True}}


def model_of(folder: Path, template: str, special: tuple[str, ...] = MARKS, **more: Any) -> ChatModel:
    return ChatModel(load_tokenizer(local_source(byte_model(folder, template, special))), **more)


def chat_of(**fields: Any) -> Chat:
    """Return a chat from keyword arguments named as the fields of OpenAI's route."""
    guided = {name: fields.pop(name) for name in GRAMMAR_FIELDS if name in fields}
    options = fields.pop("options", Options(thinking_budget=fields.pop("thinking_budget", None)))
    return Chat(**{"messages": USER, **fields}, options=options, guided=guided)


def planned(model: ChatModel, **fields: Any) -> ChatPlan:
    return plan(chat_of(**fields), model)


def ids(model: ChatModel, text: str) -> tuple[int, ...]:
    return tuple(model.tokenizer.encode(text, False))


def follows(model: ChatModel, grammar: GrammarSpec, text: str) -> bool:
    """Return True if `text` is a complete answer under the grammar.

    If the grammar applies only after a token sequence, `text` contains that sequence.
    """
    tokenizer = model.tokenizer
    size = tokenizer.vocab_size
    vocabulary = Vocabulary.of(tokenizer.token_bytes, size, size, tokenizer.eos_ids, sorted(tokenizer.special_ids))
    matcher = compiled(LLGuidance(vocabulary), grammar.kind, grammar.source).matcher()
    begun = text
    for (after,) in grammar.after:
        begun = text.partition(tokenizer.decode([after], False))[2]
        assert begun != text
    return all(matcher.accept(i) for i in (*ids(model, begun), tokenizer.eos_ids[0]))
