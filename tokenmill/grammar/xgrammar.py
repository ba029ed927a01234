"""Grammars by xgrammar: a pushdown automaton whose masks are mostly computed when it is compiled.

Compiling is the costly half, so `prepare` returns what was compiled and `finish` reads it. xgrammar lets through much
that a schema forbids; `narrow.py` refuses what it would serve loosely. Imports torch, so nothing imports this file
unless it was chosen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmill.errors import GrammarError, MissingPackage
from tokenmill.grammar import ebnf, narrow
from tokenmill.grammar.base import CLIENTS, Encode, Grammar, Mask, Matcher, Vocabulary, exact, may_force, only_ends
from tokenmill.grammar.patterns import PatternError, rewrite

_FORCES, _FREE = b"+", b"-"
_SPACES = 8  # the longest run of white space inside JSON


class XGrammar:
    """The backend."""

    def __init__(self, vocabulary: Vocabulary, encode: Encode | None = None) -> None:
        self._lib = _library()
        self.vocabulary = vocabulary
        special = set(vocabulary.special_ids)
        tokens = [b"" if i in special else text for i, text in enumerate(vocabulary.tokens)]  # b"": never text
        self._info = self._lib.TokenizerInfo(
            tokens, vocab_type=self._lib.VocabType.RAW, vocab_size=vocabulary.size,
            stop_token_ids=list(vocabulary.end_ids),
        )  # fmt: skip
        self._compiler = self._lib.GrammarCompiler(self._info, max_threads=1, cache_enabled=False)
        self._encode = exact(encode, vocabulary)

    def prepare(self, kind: str, source: str) -> bytes:
        """The compiled grammar as text, and before it whether its matchers look for forced text."""
        try:
            compiled = self._compile(kind, source)
        except (PatternError, RuntimeError) as error:
            raise GrammarError(_explain(str(error))) from None
        mask = self.vocabulary.new_mask(1)
        matcher = self._lib.GrammarMatcher(compiled)
        matcher.fill_next_token_bitmask(mask.view(np.int32), 0)
        if not mask.any():
            raise GrammarError("The grammar cannot be used: nothing matches it.")
        return (_FORCES if may_force(kind, source) else _FREE) + str(compiled.serialize_json()).encode()

    def finish(self, prepared: bytes) -> Grammar:
        """Reads what `prepare` made."""
        compiled = self._lib.CompiledGrammar.deserialize_json(prepared[1:].decode(), self._info)
        encode = self._encode if prepared.startswith(_FORCES) else None
        return XGGrammar(self._lib, compiled, encode, only_ends(self.vocabulary))

    def filler(self, num_threads: int) -> XGFiller:
        """Masks on `num_threads` threads of xgrammar."""
        return XGFiller(self._lib.BatchGrammarMatcher(num_threads))

    def _compile(self, kind: str, source: str) -> Any:
        if kind == "json_schema":
            text = json.dumps(narrow.schema(json.loads(source)), ensure_ascii=False)
            return self._compiler.compile_json_schema(text, strict_mode=False, max_whitespace_cnt=_SPACES)
        if kind == "regex":
            return self._compiler.compile_regex(narrow.pattern(rewrite(source, search=False).text))
        if kind == "choice":
            alternatives = " | ".join(_quoted(text) for text in json.loads(source))
            return self._compiler.compile_grammar(f"root ::= {alternatives}")
        if kind == CLIENTS and ebnf.is_ebnf(source):
            return self._compiler.compile_grammar(_ebnf(ebnf.parse(source)))
        if kind in ("lark", CLIENTS):
            if "%json" in source or "%llguidance" in source:
                raise PatternError("`%json` and `%llguidance` are known to the backend llguidance alone")
            return self._compiler.compile_lark(source)
        raise PatternError(f"the kind {kind!r} is not supported")


class XGGrammar:
    """A compiled grammar. `encode` None: its matchers force nothing."""

    def __init__(self, lib: Any, compiled: Any, encode: Encode | None, ends: NDArray[np.uint32]) -> None:
        self._lib, self._compiled, self._encode, self._ends = lib, compiled, encode, ends
        self.nbytes = int(compiled.memory_size_bytes)

    def matcher(self) -> XGMatcher:
        """A new place at the beginning."""
        return XGMatcher(self._lib.GrammarMatcher(self._compiled), self._encode, self._ends)


class XGMatcher:
    """`base.Matcher` over xgrammar's."""

    failure = ""

    def __init__(self, inner: Any, encode: Encode | None, ends: NDArray[np.uint32]) -> None:
        self.inner = inner
        self._encode, self.ends = encode, ends

    def fill_mask(self, mask: Mask, row: int) -> None:
        """Behind an end token: the end only."""
        if self.inner.is_terminated():
            mask[row] = self.ends
        else:
            self.inner.fill_next_token_bitmask(mask.view(np.int32), row)

    def accept(self, token_id: int) -> bool:
        """Refused tokens change nothing."""
        return not self.inner.is_terminated() and bool(self.inner.accept_token(token_id))

    def rollback(self, n: int) -> None:
        """Any number."""
        if n:
            self.inner.rollback(n)

    def forced(self, most: int) -> list[int]:
        """All but the last token of the forced text, which what follows may lengthen."""
        if self._encode is None or self.done:
            return []
        try:
            text = self.inner.find_jump_forward_string().encode()
        except UnicodeDecodeError:  # in the middle of a character
            return []
        return list(self._encode(text))[:-1][:most] if text else []

    @property
    def done(self) -> bool:
        """Looks at the mask where the grammar may end, for xgrammar does not say."""
        if self.inner.is_terminated():
            return True
        if not self.inner.is_completed():
            return False
        mask = np.zeros((1, len(self.ends)), np.uint32)
        self.fill_mask(mask, 0)
        return not (mask[0] & ~self.ends).any()


class XGFiller:
    """`base.MaskFiller` on xgrammar's threads."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def fill(self, pairs: Sequence[tuple[Matcher, int]], mask: Mask) -> None:
        """One call for all that are not behind their end."""
        matchers: list[Any] = []
        rows: list[int] = []
        for matcher, row in pairs:
            assert isinstance(matcher, XGMatcher)
            if matcher.inner.is_terminated():
                mask[row] = matcher.ends
            else:
                matchers.append(matcher.inner)
                rows.append(row)
        if matchers:
            self._batch.batch_fill_next_token_bitmask(matchers, mask.view(np.int32), rows)


def _library() -> Any:
    try:
        import xgrammar
    except ImportError:
        raise MissingPackage(
            "`--grammar-backend xgrammar` needs xgrammar, which is not installed. Install it with "
            "`pip install 'tokenmill[xgrammar]'`, or leave the option out."
        ) from None
    return xgrammar


def _ebnf(rules: Mapping[str, ebnf.Node]) -> str:
    """Rules in xgrammar's words: it takes fewer names and forms."""
    names = {name: ebnf.ROOT if name == ebnf.ROOT else f"r{number}" for number, name in enumerate(rules)}

    def text(node: ebnf.Node) -> str:
        if node.kind == "char":
            found = "[^]" if node.text == ebnf.ANY else node.text if node.text.startswith("[") else f"[{node.text}]"
            return re.sub(r"\\x\{([0-9A-F]+)\}", lambda code: f"\\U{code[1]:0>8}", found)
        if node.kind == "rule":
            return names[node.text]
        parts = [text(part) for part in node.parts] or ['""']
        if node.kind == "repeat":
            return f"({parts[0]}){{{node.low},{'' if node.high is None else node.high}}}" if node.high != 0 else '""'
        return f"({(' | ' if node.kind == 'any' else ' ').join(parts)})"

    return "\n".join(f"{names[name]} ::= {text(rule)}" for name, rule in rules.items())


def _quoted(text: str) -> str:
    return '"' + "".join(_quoted_char(character) for character in text) + '"'


def _quoted_char(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return f"\\u{ord(character):04x}" if character < " " else character


def _explain(fault: str) -> str:
    line = next((line for line in fault.strip().split("\n") if line), "")
    return f"The grammar cannot be used: {line.rpartition(': ')[2] if '.cc:' in line else line}".rstrip(".") + "."


