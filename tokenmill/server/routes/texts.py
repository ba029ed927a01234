"""Answers that are lists of texts: shared by Vertex AI's and KServe's routes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenmill.errors import ValidationError
from tokenmill.server import answering, receipt
from tokenmill.server.call import Call
from tokenmill.server.generation import GeneratedToken, Generation
from tokenmill.server.routes.native import options_of
from tokenmill.server.schema.native import GenerateParameters
from tokenmill.text.answer_reader import AnswerReader
from tokenmill.text.prepare import Prepared

_SHAPING = ("details", "decoder_input_details", "top_n_tokens")


TextOf = Callable[[Generation, Sequence[GeneratedToken]], str]
"""Function from a sequence and its tokens to its text."""


class Texts:
    """An `answering.AnswerFormat` that is never streamed. `text_of`: for each sequence, makes its text; `encode`: makes
    the body."""

    def __init__(self, text_of: Sequence[TextOf], encode: Callable[[list[str]], bytes]) -> None:
        self._text_of, self._encode = text_of, encode

    def chunk(self, generation: Generation, token: GeneratedToken) -> bytes:
        """See `answering.AnswerFormat`."""
        raise NotImplementedError("these answers are not streamed")

    def closing(self, generations: Sequence[Generation]) -> bytes:
        """See `answering.AnswerFormat`."""
        return b""

    def fold(self, generations: Sequence[Generation], tokens: Sequence[list[GeneratedToken]]) -> bytes:
        """See `answering.AnswerFormat`."""
        each = zip(self._text_of, generations, tokens, strict=True)
        return self._encode([text_of(generation, its_tokens) for text_of, generation, its_tokens in each])


def with_prompt(prompt: str) -> TextOf:
    """Return a function that puts `prompt` before the generated text."""
    return lambda generation, tokens: prompt + generation.text


def check_count(call: Call, field: str, count: int) -> None:
    """Raise ValidationError if a call has more prompts than can run."""
    most = call.service.options.max_concurrent_requests
    if count > most:
        raise ValidationError(f"`{field}` supports up to {most} prompts. Given: {count}", field)


async def prepare_text(call: Call, inputs: str, given: GenerateParameters, where: str) -> Prepared:
    """Prepare one prompt whose answer is a text. Raises ValidationError, also for options that ask for more."""
    for name in _SHAPING:
        if getattr(given, name):
            raise ValidationError(f"`{name}` is not supported here: the answer is a text. Given in {where}", name)
    if (given.best_of or 1) > 1:
        raise ValidationError(f"`best_of` != 1 is not allowed for this endpoint. Given in {where}", "best_of")
    return await call.service.encode(inputs, options_of(given), "native", stream=False)


async def answer(
    call: Call, prompts: Sequence[Prepared], num_characters: int, texts: Texts, readers: Sequence[AnswerReader] = ()
) -> None:
    """Generate for every prompt, and answer. Permits must have been taken. `readers`: see `answering.Prompts`."""
    made = answering.Prompts(
        tuple(prompts), keep_stop=True, num_characters=num_characters, receipt=receipt.requested(call),
        readers=tuple(readers),
    )  # fmt: skip
    await answering.fold(call, made, texts)
