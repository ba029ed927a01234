"""Translation of EBNF, which has no lexemes, into a grammar of the same language in llguidance's Lark.

Lark is read in two stages: a lexer cuts the text into the longest lexemes, and a parser sees only these. This module
chooses the parts of the rules that become lexemes. A single character always may. A larger part may if it is not
recursive, and no text of any lexeme, followed by the beginning of a successor, is a prefix of a text of this part: then
the longest match is the only one. Larger lexemes make faster masks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from tokenmill.errors import GrammarError
from tokenmill.grammar.ebnf import ROOT, Node

_WIDE = r"[^\x00-\x7F]"
_ROUNDS = 20  # attempts to split lexemes before all lexemes are single characters

T = TypeVar("T")
Characters = frozenset[str]
"""Regular expressions of single characters. If one may be outside of ASCII, the set includes all characters outside of
ASCII, because the lexer reads bytes and cannot tell these characters apart by the first byte."""


def lark(rules: Mapping[str, Node], matches: Callable[[str], bool]) -> str:
    """Translate rules, of which `root` is the start, into Lark. Raises GrammarError if no text matches them.

    matches: returns whether any text matches a Lark grammar; called about ten times.
    """
    grammar = _Grammar(rules)
    for _ in range(_ROUNDS):
        doubtful = grammar.begun_by_others(matches)
        if not doubtful:
            break
        grammar.broken |= doubtful
    else:
        grammar.only_characters = True
    return grammar.lark()


class _Grammar:
    """Rules and the choice of lexemes: the largest regular parts, except those in `broken`."""

    def __init__(self, rules: Mapping[str, Node]) -> None:
        self.rules = rules
        self.broken: set[Node] = set()
        self.only_characters = False
        self._halves: dict[Node, Sequence[Node]] = {}
        self._users: dict[str, set[str]] = defaultdict(set)
        for name, rule in rules.items():
            for node in _named(rule):
                self._users[node.text].add(name)
        if not self._least_fixed_point(lambda node, found: _holds(node, found, char=True), False)[ROOT]:
            raise GrammarError(f"The grammar cannot be used: nothing matches it, for `{ROOT}` never ends.")
        regular = self._least_fixed_point(lambda node, found: all(found[named.text] for named in _named(node)), False)
        for rule in rules.values():
            for node in rule.walk():
                node.regular = regular[node.text] if node.kind == "rule" else all(part.regular for part in node.parts)
        self._empty = self._least_fixed_point(lambda node, found: _holds(node, found, char=False), False)
        self._first = self._least_fixed_point(self._firsts, Characters())

    def _least_fixed_point(self, value_of: Callable[[Node, Mapping[str, T]], T], start: T) -> dict[str, T]:
        """Compute the least fixed point of a property of rules that depends on the rules they refer to."""
        found, todo = dict.fromkeys(self.rules, start), dict.fromkeys(self.rules)
        while todo:
            name = todo.popitem()[0]
            value = value_of(self.rules[name], found)
            if value != found[name]:
                found[name] = value
                todo.update(dict.fromkeys(self._users[name]))
        return found

    def _firsts(self, node: Node, found: Mapping[str, Characters]) -> Characters:
        """Return the characters with which a text of the node may begin."""
        if node.kind == "char":
            return Characters((node.text, _WIDE) if node.wide else (node.text,))
        if node.kind == "rule":
            return found[node.text]
        first = Characters()
        for part in node.parts:
            first |= self._firsts(part, found)
            if node.kind == "all" and not self._may_be_empty(part):
                break
        return first

    def _may_be_empty(self, node: Node) -> bool:
        return _holds(node, self._empty, char=False)

    def _lexeme(self, node: Node) -> Node | None:
        """Return the node of this lexeme, the same for all references to a rule; None if it is no lexeme."""
        while node.kind == "rule" and node.regular:
            node = self.rules[node.text]
        whole = node.regular and node not in self.broken and not self.only_characters
        return node if whole or node.kind == "char" else None

    def _parts(self, node: Node) -> Sequence[Node]:
        """Return the parts of a node that is no lexeme.

        A regular sequence is split before its last part, because that part is the one that overlaps its successor.
        """
        if self.only_characters or not node.regular or node.kind != "all" or len(node.parts) < 3:
            return node.parts
        if all(part.kind == "char" for part in node.parts):
            return node.parts
        if node not in self._halves:
            self._halves[node] = [Node("all", parts=node.parts[:-1], regular=True), node.parts[-1]]
        return self._halves[node]

    def _followers(self) -> dict[Node, Characters]:
        """Map each lexeme to the characters with which its successors may begin."""
        found: dict[Node, Characters] = {}
        behind_rule = {ROOT: Characters()}
        todo = [ROOT]

        def visit(node: Node, behind: Characters) -> None:
            lexeme = self._lexeme(node)
            if lexeme is not None:
                found[lexeme] = found.get(lexeme, behind) | behind
            elif node.kind == "rule":
                if node.text not in behind_rule or not behind <= behind_rule[node.text]:
                    behind_rule[node.text] = behind_rule.get(node.text, behind) | behind
                    todo.append(node.text)
            else:
                if node.kind == "repeat" and node.high != 1:
                    behind |= self._firsts(node.parts[0], self._first)
                for part in reversed(self._parts(node)):
                    visit(part, behind)
                    if node.kind == "all":
                        first = self._firsts(part, self._first)
                        behind = first | behind if self._may_be_empty(part) else first

        while todo:
            name = todo.pop()
            visit(self.rules[name], behind_rule[name])
        return found

    def begun_by_others(self, matches: Callable[[str], bool]) -> set[Node]:
        """Return the lexemes of several characters of which a text begins with a lexeme and its successor."""
        terminals = _Terminals(self.rules)
        followers = self._followers()
        several = [node for node in followers if node.kind != "char"]
        texts: dict[Characters, list[str]] = defaultdict(list)
        for node, behind in followers.items():
            name = terminals.pattern(node)
            texts[behind].append(f"({name} & /(?s:.+)/)" if self._may_be_empty(node) else name)
        begun = " | ".join(
            f"({' | '.join(names)}) /({'|'.join(sorted(behind))})(?s:.*)/" for behind, names in texts.items() if behind
        )

        def hit(nodes: list[Node]) -> set[Node]:
            names = " | ".join(map(terminals.pattern, nodes))
            if not matches(f"start: HIT\nHIT: ({begun}) & ({names})\n{terminals.definitions()}"):
                return set()
            middle = len(nodes) // 2
            return hit(nodes[:middle]) | hit(nodes[middle:]) if middle else set(nodes)

        return hit(several) if several and begun else set()

    def lark(self) -> str:
        """Write the whole grammar in Lark."""
        terminals = _Terminals(self.rules)
        names = [ROOT]
        numbers = {ROOT: 0}

        def expression(node: Node) -> str:
            lexeme = self._lexeme(node)
            if lexeme is not None:
                return terminals.pattern(lexeme)
            if node.kind == "rule":
                if node.text not in numbers:
                    numbers[node.text] = len(names)
                    names.append(node.text)
                return f"r{numbers[node.text]}"
            return _joined(node, [expression(part) for part in self._parts(node)])

        rules = "".join(f"r{numbers[name]}: {expression(self.rules[name])}\n" for name in names)  # it grows meanwhile
        return f"start: r0\n{rules}{terminals.definitions()}"


class _Terminals:
    """Lark terminals for regular nodes, each defined once."""

    def __init__(self, rules: Mapping[str, Node]) -> None:
        self._rules = rules
        self._names: dict[Node, str] = {}
        self._nodes: list[Node] = []

    def pattern(self, node: Node) -> str:
        """Return the Lark text for a regular node: a terminal's name, or a character's regular expression."""
        while node.kind == "rule":
            node = self._rules[node.text]
        if node.kind == "char":
            return f"/{node.text}/"
        if node not in self._names:
            self._names[node] = f"T{len(self._nodes)}"
            self._nodes.append(node)
        return self._names[node]

    def definitions(self) -> str:
        """Return the definitions of all terminals named so far, and of the terminals in these."""
        return "".join(f"{self._names[node]}: {self._definition(node)}\n" for node in self._nodes)  # it grows meanwhile

    def _definition(self, node: Node) -> str:
        inner = (self.pattern(part) if part.kind in ("char", "rule") else self._definition(part) for part in node.parts)
        return _joined(node, list(inner))


def _joined(node: Node, parts: list[str]) -> str:
    """Return a node in Lark's syntax, given the text of its parts."""
    if node.kind == "repeat":
        return '""' if node.high == 0 else f"({parts[0]}){{{node.low},{'' if node.high is None else node.high}}}"
    text = (" | " if node.kind == "any" else " ").join(parts)
    return f"({text})" if len(parts) > 1 else text or '""'


def _named(node: Node) -> list[Node]:
    return [inner for inner in node.walk() if inner.kind == "rule"]


def _holds(node: Node, found: Mapping[str, bool], *, char: bool) -> bool:
    """Return whether a property of the rules in `found` holds for a node; `char` is its value for a character.

    It holds for a choice if it holds for one alternative, for a sequence if for all parts, always for an optional part.
    """
    if node.kind == "char":
        return char
    if node.kind == "rule":
        return found[node.text]
    if node.kind == "repeat" and node.low == 0:
        return True
    return (any if node.kind == "any" else all)(_holds(part, found, char=char) for part in node.parts)
