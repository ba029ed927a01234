"""The marks of thoughts, found from the chat template, and the splitter of thoughts and answer.

`reasoning_of` returns the marks of the thoughts in an answer to a rendered prompt. `Splitter` reads an answer. White
space next to the marks belongs to them, as templates write it.
"""

from __future__ import annotations

import msgspec

from tokenmill.errors import Unsupported
from tokenmill.text.output import DeltaBuilder
from tokenmill.text.reader import Broken, Markers, Reading, TextCursor, expect, peek, spaces, take
from tokenmill.text.reasoning_calls import CallFinder

_MOST_SPACE = 32  # characters of white space that are held back, because a mark may follow


class ReasoningFormat(msgspec.Struct, frozen=True):
    """The marks of a thought.

    `start` and `end` enclose it; with `already_open` the prompt ends inside of it. Behind the first `answer` the
    answer's own text begins, and with it a grammar. `closing`: the text that ends a thought whose budget is spent.
    `wrap`: marks around the answer that are not part of it. `channels`: thoughts are channels, which tools/harmony.py
    reads.
    """

    name: str
    start: str
    end: str
    answer: str
    closing: str
    already_open: bool = False
    wrap: tuple[str, str] | None = None
    channels: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that may be special tokens, and that the splitter must receive."""
        return (self.start, self.end, *(self.wrap or ()))


def _between(name: str, start: str, end: str, wrap: tuple[str, str] | None = None) -> ReasoningFormat:
    return ReasoningFormat(name, start, end, end, f"\n{end}\n\n", wrap=wrap)


HARMONY = ReasoningFormat(
    "harmony",
    start="<|channel|>analysis<|message|>",
    end="<|end|>",
    answer="<|channel|>final<|message|>",
    closing="<|end|><|start|>assistant<|channel|>final<|message|>",
    channels=True,
)
GRANITE = _between("granite", "Here is my thought process:", "Here is my response:")
GRANITE_TAGS = _between("granite_tags", "<think>", "</think>", ("<response>", "</response>"))
COMMAND = _between("command", "<|START_THINKING|>", "<|END_THINKING|>", ("<|START_RESPONSE|>", "<|END_RESPONSE|>"))
FORMATS = (
    HARMONY,
    COMMAND,
    _between("magistral", "[THINK]", "[/THINK]"),
    _between("seed", "<seed:think>", "</seed:think>"),
    GRANITE,
    GRANITE_TAGS,
    _between("think", "<think>", "</think>"),
)
_ALIASES = {
    "gpt-oss": "harmony", "gptoss": "harmony", "gpt_oss": "harmony", "openai_gptoss": "harmony", "mistral": "magistral",
    "seed_oss": "seed", "cohere_command3": "command",
    **dict.fromkeys(("deepseek_r1", "deepseek-r1", "deepseek_v3", "deepseek-v3", "qwen3", "qwen3-thinking", "qwq",
                     "glm45", "glm4_moe", "kimi", "kimi_k2", "step3", "smollm3", "olmo3"), "think"),
}  # fmt: skip


def by_name(parser: str) -> ReasoningFormat:
    """Return the format of that name, as other servers take it in `--reasoning-parser`. Raises Unsupported."""
    wanted = _ALIASES.get(parser.lower(), parser.lower())
    for form in FORMATS:
        if form.name == wanted:
            return form
    raise Unsupported("reasoning parser", parser, known=[form.name for form in FORMATS])


def of_template(template: str) -> ReasoningFormat | None:
    """Return the format whose marks are in a template's source; None if its model does not think."""
    for form in FORMATS:
        if form.channels:
            found = "<|channel|>" in template and "<|message|>" in template
        elif form is GRANITE:
            found = form.start in template and form.end in template
        else:
            found = all(mark in template for mark in (form.end, *(form.wrap or ())))
        if found:
            return form
    return None


def reasoning_of(template: str, prompt: str, parser: str = "") -> ReasoningFormat | None:
    """Return the format of the thoughts in the answer to a prompt. None: the model does not think, or the prompt has
    closed the thought, as templates do that turn thinking off."""
    form = by_name(parser) if parser else of_template(template)
    if form is None or form.channels:
        return form
    tail = prompt.rstrip()
    if tail.endswith(form.end):
        return None
    return msgspec.structs.replace(form, already_open=True) if tail.endswith(form.start) else form


class StrayEndMark:
    """Remover of a mark at the beginning of a text in pieces: a thought's end mark after a call has ended the
    thought."""

    __slots__ = ("_held", "_mark", "_passed")

    def __init__(self, mark: str) -> None:
        self._mark, self._held, self._passed = mark, "", False

    def push(self, text: str) -> str:
        """Return the text to show."""
        if self._passed:
            return text
        self._held += text
        begun = self._held.lstrip()
        if self._mark.startswith(begun[: len(self._mark)]):
            if len(begun) <= len(self._mark) or begun[len(self._mark) :].isspace():
                return ""
            self._held = begun[len(self._mark) :].lstrip()
        self._passed = True
        return self.finish()

    def finish(self) -> str:
        """Return the text that was held back."""
        text, self._held = self._held, ""
        return "" if text.lstrip().startswith(self._mark) else text


class Splitter:
    """Splitter of one answer. `push` text as it comes, then `finish` once; both return (thought, rest). `finder`: finds
    calls inside of a thought, which end it like its end mark."""

    __slots__ = ("_cursor", "_finder", "_form", "_marks", "_out", "_run", "called", "end", "inside", "passed")

    def __init__(self, form: ReasoningFormat, finder: CallFinder | None = None) -> None:
        self._form, self.end = form, form.end
        self._finder = finder
        self._marks = Markers(form.end, *(finder.starts if finder else ()))
        self._cursor = TextCursor()
        self._out = DeltaBuilder({}, str)
        self.inside = form.already_open  # the current text is a thought
        self.called = False  # a call has ended the thought
        self.passed = False  # no thought can come any more: `push` returns its text
        self._run = self._answer()
        next(self._run, None)

    def push(self, text: str) -> tuple[str, str]:
        """Return the parts of `text`."""
        if self.passed and self._form.wrap is None:
            return "", text
        self._cursor.feed(text)
        next(self._run, None)
        delta = self._out.take()
        return delta.reasoning, delta.content

    def finish(self) -> tuple[str, str]:
        """End the answer, and return the parts that were held back."""
        self._cursor.ended = True
        next(self._run, None)
        delta = self._out.take()
        return delta.reasoning, delta.content

    def _answer(self) -> Reading[None]:
        r, form = self._cursor, self._form
        if not form.already_open:
            try:
                yield from spaces(r)
                yield from expect(r, form.start)
                self.inside = True
                r.settle()
            except Broken:
                r.rewind()
        if self.inside:
            yield from self._thought()
            self.inside = False
        self.passed = True
        if form.wrap is None:
            self._out.content(r.text[r.pos :])
            r.pos = len(r.text)
        else:
            yield from self._wrapped(form.wrap)

    def _thought(self) -> Reading[None]:
        """Read text up to the end mark or a call, without the white space around it."""
        r = self._cursor
        if self._form.already_open:  # some models open it again
            yield from spaces(r)
            yield from take(r, self._form.start)
        yield from spaces(r)
        if self._finder is not None and self._finder.begins((yield from peek(r))) and (yield from self._calls(r.pos)):
            return
        while True:
            found = self._search(r.text, r.pos)
            stop = found[0] if found else len(r.text) - (0 if r.ended else self._marks.held(r.text, r.pos))
            if found or not r.ended:
                begin = max(r.pos, stop - _MOST_SPACE)
                stop = begin + len(r.text[begin:stop].rstrip())
            self._emit(stop)
            if found and found[1] == self.end:
                r.pos = found[0] + len(self.end)
                self.inside = False
                yield from spaces(r)
            elif found:
                behind = found[0] + len(found[1]) - r.pos
                if not (yield from self._calls(found[0])):
                    self._emit(behind)
                    continue
            if found or r.ended:
                r.settle()
                return
            r.settle()
            yield

    def _search(self, text: str, pos: int) -> tuple[int, str] | None:
        """Return the place and text of the first mark."""
        if self._finder is not None:
            return self._finder.search(self._marks, text, pos)
        found = self._marks.search(text, pos)
        return (found.start(), found.group()) if found else None

    def _emit(self, stop: int) -> None:
        r = self._cursor
        if stop > r.pos:
            self._out.reasoning(r.text[r.pos : stop])
            r.pos = stop

    def _calls(self, at: int) -> Reading[bool]:
        """Return True if a call begins at a place; the text is then read from there. While that is open, the text is
        not a thought."""
        r, finder = self._cursor, self._finder
        assert finder is not None
        at -= r.pos
        r.settle()
        self.inside = False
        self.called = yield from finder.calls(r, at)
        self.inside = not self.called
        r.pos = at if self.called else 0
        r.settle()
        return self.called

    def _wrapped(self, wrap: tuple[str, str]) -> Reading[None]:
        """Read the answer without the marks around it. A mark that is not at its beginning or end is text."""
        r = self._cursor
        yield from spaces(r)
        opened = bool((yield from take(r, wrap[0])))
        if not opened:
            r.rewind()
        else:
            yield from spaces(r)
        r.settle()
        close = Markers(wrap[1]) if opened else Markers()
        while True:
            found = close.search(r.text, r.pos)
            stop = found.start() if found else len(r.text) - (0 if r.ended else close.held(r.text, r.pos))
            self._out.content(r.text[r.pos : stop])
            r.pos = stop
            r.settle()
            if found:
                r.pos = len(found.group())
                yield from spaces(r)
                if r.pos < len(r.text):
                    r.rewind()
                    r.pos = len(found.group())
                    self._out.content(found.group())
                    r.settle()
            elif r.ended:
                return
            else:
                yield
