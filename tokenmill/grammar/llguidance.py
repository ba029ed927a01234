"""The grammar backend on llguidance: an Earley parser over derivatives of regular expressions, evaluated lazily.

Compiling is quick and lazy, so `prepare` compiles to check the grammar, and `finish` compiles it again in the engine's
process. `kind` "lark" is llguidance's dialect of Lark, with `%json {…}` and special tokens written `<|name|>`; clients
write this dialect or EBNF.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import llguidance as lib
import numpy as np
from numpy.typing import NDArray

from tokenmill.errors import GrammarError
from tokenmill.grammar import ebnf, lexemes, schema
from tokenmill.grammar.base import (
    CLIENTS,
    Encode,
    Grammar,
    Mask,
    Matcher,
    Vocabulary,
    exact,
    may_demand,
    may_force,
    needs_many_states,
    only_ends,
)
from tokenmill.grammar.locate import locate
from tokenmill.grammar.patterns import PatternError, literal, rewrite

SPACE = r"[ \t]|\r?\n[ \t]{0,40}"
"""White space inside JSON: one blank, or a line end with an indentation. Bounded, because weak models never stop."""

_NOTHING = "nothing matches it"
_NAMES = {
    "regex": "regular expression", "lark": "grammar", CLIENTS: "grammar", "choice": "list of choices",
    "json_schema": "JSON schema",
}  # fmt: skip
_CLEARER = (
    ("oneOf constraints are not supported", "its alternatives are not provably exclusive; `anyOf` can be served"),
    ("NoExtension", _NOTHING),
    ("too many expressions", "it needs too many states"),
    ("Too many items", "it can be read in too many ways"),
)
_ESCAPES = 'nrbtf\\"'
_TEXT = r'"\\<>=`\[\]\x00-\x1F\x7F'  # ends of JSON strings, and first or last characters of markers in free text
_SLICES = (r"[\x20\x0A\x0D\x09]+", rf"[^{_TEXT}]{{1,10}}", rf"[^{_TEXT}]{{1,30}}", r'[^"\\\x00-\x1F\x7F]+')
"""Sets of tokens that are allowed or refused at once where a lexeme repeats characters; see text/lark.py."""
_STEP_FUEL = 50_000  # in llguidance's unit: about 4 ms for one mask, for which the whole batch waits
_STEPS = 32
_LARGE_SOURCE = 8_000  # characters; a longer source of any kind may need many states
_UNFORCED = '\n%llguidance {"no_forcing": true}\n'
_MASK_ITEM_BYTES = 4
_FIXED_BYTES = 64 << 10  # measured: a small grammar takes 66 kB, a large one a hundred times its text
_BYTES_PER_CHARACTER = 100


class LLGuidance:
    """The grammar backend. Building one takes about 3 µs per token of the vocabulary."""

    def __init__(self, vocabulary: Vocabulary, encode: Encode | None = None) -> None:
        self.vocabulary, self._unspelled = vocabulary, vocabulary.unspelled()
        wrapped = lib.TokenizerWrapper(_Tokens(vocabulary, encode))
        self._tokenizer = lib.LLTokenizer(wrapped, eos_token=list(vocabulary.end_ids), slices=list(_SLICES))
        self._limits = lib.LLParserLimits(step_lexer_fuel=_STEP_FUEL, verbose_errors=False)
        self._ends = Ends(frozenset(vocabulary.end_ids), only_ends(vocabulary))

    def prepare(self, kind: str, source: str) -> bytes:
        """Compile, and compute at least one mask. Returns the grammar in the library's syntax."""
        if kind == CLIENTS and ebnf.is_ebnf(source):
            source = lexemes.lark(ebnf.parse(source), self._matches)
        text = self._grammar_text(kind, source)
        matcher = self._compile(kind, source, text)
        mask = self.vocabulary.new_mask(1)
        first = LLMatcher(matcher, self._ends)
        first.fill_mask(mask, 0)
        if not (first.failure or (mask[0] & ~self._ends.row).any() or matcher.is_accepting()):
            raise GrammarError(_explain(kind, _NOTHING))
        if kind == CLIENTS or len(source) > _LARGE_SOURCE or needs_many_states(source):
            self._try_out(first, mask)
        if first.failure:
            raise GrammarError(_explain(kind, first.failure))
        return text.encode()

    def _try_out(self, matcher: LLMatcher, mask: Mask) -> None:
        """Take some random steps, so that patterns with too many states are refused before anything is generated."""
        draw = np.random.default_rng(0)
        for _ in range(_STEPS):
            allowed = np.flatnonzero(np.unpackbits((mask[0] & ~self._ends.row).view(np.uint8), bitorder="little"))
            if matcher.failure or not allowed.size or not matcher.accept(int(draw.choice(allowed))):
                return
            matcher.fill_mask(mask, 0)

    def finish(self, prepared: bytes) -> Grammar:
        """Compile again, which takes less than a millisecond for most grammars. Releases the interpreter lock."""
        text = prepared.decode()
        return LLGrammar(self._matcher(text), len(text), self._ends)

    def filler(self, num_threads: int) -> LLFiller:
        """Return a filler with `num_threads` threads of llguidance."""
        return LLFiller(num_threads)

    def _matcher(self, text: str) -> lib.LLMatcher:
        return lib.LLMatcher(self._tokenizer, text, log_level=0, limits=self._limits)

    def _compile(self, kind: str, source: str, text: str) -> lib.LLMatcher:
        matcher = self._matcher(text)
        if matcher.is_error():
            fault = _first_line(matcher.get_error())
            if kind == "json_schema":
                raise GrammarError(locate(source, self._fault, fault))
            raise GrammarError(_explain(kind, fault))
        if kind == "json_schema" and matcher.is_accepting():
            raise GrammarError(_explain(kind, _NOTHING))  # JSON is never empty
        return matcher

    def _fault(self, source: str) -> str:
        found = self._matcher(self._grammar_text("json_schema", source))
        return _first_line(found.get_error()) if found.is_error() else ""

    def _grammar_text(self, kind: str, source: str) -> str:
        """As `grammar_text`. Where no token spells a byte of forced text, the library's masks lose what follows it."""
        return grammar_text(kind, source, self._unspelled.isdisjoint(may_demand(source)))

    def _matches(self, text: str) -> bool:
        """Return whether any text matches a Lark grammar. True if deciding that needs too many states."""
        matcher = LLMatcher(self._matcher(text + _UNFORCED), self._ends)
        matcher.fill_mask(self.vocabulary.new_mask(1), 0)
        return matcher.failure != _NOTHING


class Ends(NamedTuple):
    """The end tokens: their ids, and the mask row that allows only them."""

    ids: frozenset[int]
    row: NDArray[np.uint32]


class LLGrammar:
    """A compiled grammar. Its matchers are copies of one at the beginning."""

    def __init__(self, start: lib.LLMatcher, num_characters: int, ends: Ends) -> None:
        self._start, self._ends = start, ends
        self.nbytes = _FIXED_BYTES + _BYTES_PER_CHARACTER * num_characters

    def matcher(self) -> LLMatcher:
        """Copy the matcher at the beginning, in about 50 µs."""
        return LLMatcher(self._start, self._ends)


class LLMatcher:
    """`base.Matcher` over a copy of llguidance's. Counts end tokens itself, for llguidance accepts one of several."""

    def __init__(self, start: lib.LLMatcher, ends: Ends) -> None:
        self.inner = start.deep_copy()
        self._start, self._ends = start, ends
        self._accepted: list[int] = []  # llguidance cannot roll back a lexeme with stop= or max_tokens=
        self._num_ends = 0

    def fill_mask(self, mask: Mask, row: int) -> None:
        """Overwrite one row. Releases the interpreter lock."""
        target = mask[row]
        self.inner.unsafe_compute_mask_ptr(target.ctypes.data, target.nbytes)
        self.mend(mask, row)

    def mend(self, mask: Mask, row: int) -> None:
        """Correct a computed row: after an end token or a failure, only end tokens are allowed."""
        if self.done or not mask[row].any():
            mask[row] = self._ends.row

    def accept(self, token_id: int) -> bool:
        """Advance by one token. A refused token leaves the matcher unchanged."""
        if token_id in self._ends.ids:
            if not self.inner.is_accepting():
                return False
            self._num_ends += 1
            return True
        if self._num_ends or self.inner.is_error() or not self.inner.try_consume_tokens([token_id]):
            return False
        self._accepted.append(token_id)
        return True

    def rollback(self, n: int) -> None:
        """Roll back in llguidance or, where it cannot, replay from the beginning."""
        ends = min(n, self._num_ends)
        self._num_ends -= ends
        n -= ends
        if not n:
            return
        del self._accepted[len(self._accepted) - n :]
        if self.inner.is_error() or not self.inner.rollback(n):
            self.inner = self._start.deep_copy()
            self.inner.try_consume_tokens(self._accepted)

    def forced(self, most: int) -> list[int]:
        """Return forced tokens, split as by the model's tokenizer."""
        if self.done:
            return []
        return list(takewhile(lambda i: i not in self._ends.ids, map(int, self.inner.compute_ff_tokens()[:most])))

    @property
    def done(self) -> bool:
        """True after an end token, where only the end may follow, and after a failure."""
        return self._num_ends > 0 or bool(self.inner.is_stopped())

    @property
    def failure(self) -> str:
        """llguidance's message, without the generated text."""
        return _first_line(self.inner.get_error()) if self.inner.is_error() else ""


class LLFiller:
    """`base.MaskFiller` on a thread pool of llguidance."""

    def __init__(self, num_threads: int) -> None:
        self._executor = lib.LLExecutor(num_threads=num_threads)

    def fill(self, pairs: Sequence[tuple[Matcher, int]], mask: Mask) -> None:
        """Fill all rows in one call."""
        ours = [(_ours(matcher), row) for matcher, row in pairs]
        row_bytes = mask.shape[1] * _MASK_ITEM_BYTES
        assert mask.flags.c_contiguous
        self._executor.unsafe_compute_mask_ptr(
            [(matcher.inner, row) for matcher, row in ours], mask.ctypes.data, row_bytes, mask.shape[0]
        )
        for matcher, row in ours:
            matcher.mend(mask, row)


def grammar_text(kind: str, source: str, forces: bool = True) -> str:
    """Return a grammar in llguidance's syntax. Raises GrammarError for an unknown kind.

    `forces`: False if matchers must not look for forced text, whatever the grammar.
    """
    forced = forces and may_force(kind, source)
    if kind == "json_schema" and forced:
        return str(lib.LLMatcher.grammar_from_json_schema(source, overrides=json_options(source)))
    if kind == "json_schema":
        lark = f"start: %json {lark_json(source)}"
    elif kind in ("lark", CLIENTS):
        lark = source
    elif kind in ("regex", "choice"):
        lark = f"start: /({_pattern(kind, source)})/"
    else:
        raise GrammarError(f"A grammar of the kind {kind!r} is not supported.")
    return lark if forced else lark + _UNFORCED


def _pattern(kind: str, source: str) -> str:
    """Return a regular expression for Lark, where a slash would end it and is therefore escaped."""
    if kind == "choice":
        return "|".join(f"({literal(text)})" for text in json.loads(source))
    try:
        return rewrite(source, search=False).text
    except PatternError as error:
        raise GrammarError(_explain(kind, str(error))) from None


def json_options(source: str) -> Any:
    """Return llguidance's options for a canonical schema: strict, with bounded white space."""
    options = {"whitespace_pattern": SPACE, "lenient": False, "coerce_one_of": False}
    if not schema.needs_unicode_escapes(source):
        options["json_allowed_escapes"] = _ESCAPES
    return options


def lark_json(source: str) -> str:
    """Return a canonical schema for use after `%json` in a Lark grammar, with the same options."""
    return json.dumps({"x-guidance": json_options(source), **json.loads(source)}, ensure_ascii=False)


class _Tokens:
    """The vocabulary in the form that llguidance's TokenizerWrapper requires."""

    def __init__(self, vocabulary: Vocabulary, encode: Encode | None) -> None:
        self.eos_token_id = vocabulary.end_ids[0]
        self.bos_token_id = None
        self.special_token_ids = list(vocabulary.special_ids)
        self.tokens = [*vocabulary.tokens, *(b"",) * (vocabulary.size - len(vocabulary.tokens))]
        self._encode = exact(encode, vocabulary)

    def __call__(self, text: bytes | str) -> list[int]:
        return list(self._encode(text.encode() if isinstance(text, str) else text))


def _ours(matcher: Matcher) -> LLMatcher:
    assert isinstance(matcher, LLMatcher)
    return matcher


def _first_line(text: str) -> str:
    line = text.strip().split("\n")[0][:300]
    return next((words for mark, words in _CLEARER if mark in line), line)


def _explain(kind: str, fault: str) -> str:
    return f"The {_NAMES.get(kind, kind)} cannot be used: {fault.rstrip('.')}."
