"""Check that answers follow their grammars, and measure compiling and masking, with fixed schemas and two vocabularies.

    python -m bench.grammar [--schemas 240] [--answers 3] [--vocabulary 49k|128k|all|none]
                            [--serving URL|none] [--streams 32] [--new-tokens 64] [--passes 5]

The model is simulated as the worst case: every token is drawn at random from the allowed ones, with a bias towards
tokens that end a value, so that answers finish. Finished answers are checked with `jsonschema`. The project's limits:
no invalid answer; compile p50 3 ms and p99 20 ms; mask p99 1 ms per row. "compile" is one compilation. "ready" is the
time from `submit` to the grammar, through a process of the pool: two compilations and the communication. Finally,
streams with and without a schema are compared over HTTP; the limit is a ratio of 0.9 in tokens per second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bench.grammar_serving import serving
from bench.serving import served
from tokenmill.errors import GrammarError
from tokenmill.grammar.base import Backend, Grammar, Vocabulary
from tokenmill.grammar.llguidance import LLGuidance
from tokenmill.grammar.pool import CompilePool
from tokenmill.text.guided import json_grammar

WORDS = (
    "id", "name", "e-mail", "größe", "名前", "created_at", "tags", "items", "price", "is_active", "address", "zip code",
    "notes", "status", "a/b", "quote\"d", "x", "y", "children", "kind", "score", "url", "meta", "😀", "$ref", "type",
)  # fmt: skip
PATTERNS = (
    "^[A-Z]{2}-\\d{4}$", "^(foo|bar)+$", "^[^@\\s]+@[a-z]+\\.com$", "ab+c", "^\\w{1,8}$", "^é{1,3}$", "^.{0,5}$",
    "^#[0-9a-fA-F]{6}$", "^(\\+\\d{1,3} )?\\d{3}[-.]\\d{4}$", "^a/b\\/c$",
)  # fmt: skip
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "ipv6", "email", "hostname", "uri", "duration")


class Generator:
    """Generator of random schemas of commonly used keywords, from a seed. All of them are supported."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._defs: dict[str, Any] = {}

    def root(self) -> Any:
        """Return a schema with its definitions."""
        made = self.object(3) if self._random.random() < 0.8 else self.any(3)
        return {**({"$defs": self._defs} if self._defs else {}), **made}

    def any(self, depth: int) -> dict[str, Any]:
        simple: list[Callable[[], dict[str, Any]]] = [
            self.string, self.string, self.integer, self.number, self.values, lambda: {"type": "boolean"},
            lambda: {"type": ["integer", "null"], "minimum": -5},
        ]  # fmt: skip
        if depth <= 0:
            return self._random.choice(simple)()
        nested: list[Callable[[], dict[str, Any]]] = [
            lambda: self.object(depth - 1), lambda: self.array(depth - 1), lambda: self.union(depth - 1),
            lambda: self.merged(depth - 1), lambda: self.reference(depth - 1), lambda: self.map(depth - 1),
        ]  # fmt: skip
        return self._random.choice(simple if self._random.random() < 0.55 else nested)()

    def string(self) -> dict[str, Any]:
        draw = self._random
        which = draw.randrange(6)
        if which == 0:
            return {"type": "string", "pattern": draw.choice(PATTERNS)}
        if which == 1:
            return {"type": "string", "format": draw.choice(FORMATS)}
        if which == 2:
            least = draw.randrange(4)
            return {"type": "string", "minLength": least, "maxLength": least + draw.randrange(12)}
        if which == 3:
            return {"type": "string", "maxLength": draw.randrange(1, 20)}
        return {"type": "string", "description": "free text"}

    def integer(self) -> dict[str, Any]:
        low = self._random.randrange(-1000, 1000)
        bounds: list[dict[str, Any]] = [
            {}, {"minimum": low}, {"maximum": low}, {"exclusiveMinimum": low, "maximum": low + 50},
            {"minimum": low, "maximum": low + self._random.randrange(2000)},
            {"multipleOf": self._random.randrange(2, 30)}, {"minimum": 0, "multipleOf": 5},
        ]  # fmt: skip
        return {"type": "integer", **self._random.choice(bounds)}

    def number(self) -> dict[str, Any]:
        low = round(self._random.uniform(-100, 100), 2)
        bounds: list[dict[str, Any]] = [
            {}, {"minimum": low}, {"exclusiveMaximum": low}, {"exclusiveMinimum": low, "maximum": low + 0.75},
            {"minimum": 0, "maximum": 1}, {"minimum": low, "exclusiveMaximum": low + 1000},
        ]  # fmt: skip
        return {"type": "number", **self._random.choice(bounds)}

    def values(self) -> dict[str, Any]:
        pool = ["red", "grün", "a\"b", "c\\d", "line\nbreak", 1, -2.5, None, True, [1, "x"], {"k": []}, "", "😀"]
        chosen = self._random.sample(pool, self._random.randrange(1, 6))
        return {"enum": chosen} if len(chosen) > 1 else {"const": chosen[0]}

    def object(self, depth: int) -> dict[str, Any]:
        draw = self._random
        names = draw.sample(WORDS, draw.randrange(1, 7))
        made: dict[str, Any] = {"type": "object", "properties": {name: self.any(depth) for name in names}}
        required = [name for name in names if draw.random() < 0.6]
        if required:
            draw.shuffle(required)
            made["required"] = required
        more = draw.randrange(4)
        if more < 2:
            made["additionalProperties"] = False
            if more and len(names) > len(required):
                made["minProperties"] = len(required) + 1
        elif more == 2:
            made["additionalProperties"] = self.any(0)
        return made

    def map(self, depth: int) -> dict[str, Any]:
        which = self._random.randrange(3)
        if which == 0:
            names = {"enum": self._random.sample(WORDS, 3)}
            return {"type": "object", "propertyNames": names, "additionalProperties": self.any(depth)}
        if which == 1:
            return {"type": "object", "additionalProperties": self.any(depth), "minProperties": 1, "maxProperties": 4}
        return {
            "type": "object", "additionalProperties": False,
            "patternProperties": {"^x-[a-z]+$": self.any(depth), "^\\d{1,3}$": self.any(0)},
        }  # fmt: skip

    def array(self, depth: int) -> dict[str, Any]:
        least = self._random.randrange(3)
        if self._random.random() < 0.25:
            rest = self._random.choice([False, {"type": "integer"}])
            return {"type": "array", "prefixItems": [self.any(0), self.any(depth)], "items": rest, "minItems": least}
        if self._random.random() < 0.2:
            values = {"enum": self._random.sample(WORDS, self._random.randrange(2, 5))}
            return {"type": "array", "items": values, "uniqueItems": True, "minItems": least}
        return {"type": "array", "items": self.any(depth), "minItems": least, "maxItems": least + 3}

    def union(self, depth: int) -> dict[str, Any]:
        if self._random.random() < 0.5:
            return {"anyOf": [self.any(depth) for _ in range(self._random.randrange(2, 4))]}
        tagged = [
            {"type": "object", "properties": {"kind": {"const": kind}, "value": self.any(depth)},
             "required": ["kind", "value"], "additionalProperties": False} for kind in ("cat", "dog")
        ]  # fmt: skip
        return {"oneOf": [*tagged, {"type": "string", "maxLength": 5}]}

    def merged(self, depth: int) -> dict[str, Any]:
        first, second = self.any(depth), self.any(depth)
        return {
            "allOf": [
                {"type": "object", "properties": {"left": first}, "required": ["left"]},
                {"properties": {"right": second, "left": True}},
            ]
        }

    def reference(self, depth: int) -> dict[str, Any]:
        if self._random.random() < 0.5:
            self._defs["node"] = {
                "type": "object", "required": ["value"], "additionalProperties": False,
                "properties": {"value": self.integer(), "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                               "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 3}},
            }  # fmt: skip
            return {"$ref": "#/$defs/node"}
        name = f"d{len(self._defs)}"
        self._defs[name] = True  # reserves the name
        self._defs[name] = self.any(depth)
        return {"$ref": f"#/$defs/{name}"}


def schemas(count: int, seed: int = 7) -> Iterator[Any]:
    """Yield the sample of schemas, which depends on the arguments only."""
    for number in range(count):
        yield Generator(seed * 100_003 + number).root()


class Player:
    """Sampler that simulates a model with random weights, biased towards the end of the answer."""

    def __init__(self, vocabulary: Vocabulary, seed: int) -> None:
        self._draw = np.random.default_rng(seed)
        self._vocabulary = vocabulary
        self._ends = set(vocabulary.end_ids)
        closing = [text[:1] in b'"}],' and len(text) <= 2 for text in vocabulary.tokens]
        self._closing = np.zeros(vocabulary.size, bool)
        self._closing[: len(closing)] = closing

    def choose(self, row: np.ndarray) -> int:
        """Draw one allowed token."""
        allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")[: self._vocabulary.size])
        ends = [i for i in allowed[-8:].tolist() + allowed[:8].tolist() if i in self._ends]
        if ends and self._draw.random() < 0.5:
            return int(ends[0])
        closing = allowed[self._closing[allowed]]
        return int(self._draw.choice(closing if len(closing) and self._draw.random() < 0.35 else allowed))


class Play:
    """Simulated answer: its text, `finished`, and the seconds of each mask."""

    def __init__(self, grammar: Grammar, player: Player, vocabulary: Vocabulary, most: int = 300) -> None:
        self.seconds: list[float] = []
        self.finished = False
        self.forced = 0
        ids: list[int] = []
        matcher, mask = grammar.matcher(), vocabulary.new_mask(1)
        while len(ids) < most and not self.finished:
            began = time.perf_counter()
            matcher.fill_mask(mask, 0)
            self.seconds.append(time.perf_counter() - began)
            if matcher.failure:
                break
            token_id = player.choose(mask[0])
            assert matcher.accept(token_id), "an allowed token was refused"
            self.finished = token_id in vocabulary.end_ids
            if not self.finished:
                ids.append(token_id)
                for forced in matcher.forced(16):
                    assert matcher.accept(forced), "a forced token was refused"
                    ids.append(forced)
                    self.forced += 1
        self.num_tokens = len(ids)
        self.failure = matcher.failure
        self.text = b"".join(vocabulary.tokens[i] for i in ids).decode(errors="replace")


def embedded_vocabulary() -> Vocabulary:
    """Return SmolLM2's vocabulary of 49,152 tokens, from the embedded model."""
    from tokenmill.config import default_cache_dir
    from tokenmill.text.load import load_tokenizer
    from tokenmill.weights import embedded

    tokenizer = load_tokenizer(embedded.resolve(default_cache_dir(), False, lambda progress: None))
    size = tokenizer.vocab_size
    return Vocabulary.of(tokenizer.token_bytes, size, size, tokenizer.eos_ids, tuple(tokenizer.special_ids))


def large_vocabulary(small: Vocabulary, size: int = 128_256) -> Vocabulary:
    """Return a vocabulary of Llama 3's size: the small one, and longer tokens made of pairs of its tokens."""
    draw = random.Random(1)
    special = set(small.special_ids)
    texts = [text for i, text in enumerate(small.tokens) if text and i not in special]
    made, known = list(small.tokens), set(texts)
    while len(made) < size - 256:
        text = draw.choice(texts) + draw.choice(texts)
        if len(text) <= 16 and text not in known:
            known.add(text)
            made.append(text)
    return Vocabulary(tuple(made), small.end_ids, small.special_ids, size)


def percentile(seconds: list[float], share: float) -> float:
    return 1e3 * float(np.quantile(seconds, share)) if seconds else float("nan")


def check(backend: Backend, sample: list[Any], answers: int) -> bool:
    """Print the figures of one vocabulary; return False if an answer was invalid."""
    from jsonschema import Draft202012Validator

    vocabulary = backend.vocabulary
    pool = CompilePool(backend)
    pool.submit(json_grammar({"type": "object"}, "schema")).result()  # wait until the processes have started
    compile_s: list[float] = []
    ready_s: list[float] = []
    mask_s: list[float] = []
    finished = invalid = refused = tokens = forced = 0
    for number, schema in enumerate(sample):
        try:
            spec = json_grammar(schema, "schema")
            began = time.perf_counter()
            backend.prepare(spec.kind, spec.source)
            compile_s.append(time.perf_counter() - began)
            began = time.perf_counter()
            grammar = pool.submit(spec).result()
        except GrammarError as error:
            refused += 1
            print(f"  refused: {error}")
            continue
        ready_s.append(time.perf_counter() - began)
        validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
        for answer in range(answers):
            play = Play(grammar, Player(vocabulary, number * 1000 + answer), vocabulary)
            mask_s += play.seconds
            tokens, forced = tokens + play.num_tokens, forced + play.forced
            if play.failure:
                print(f"  failed: {play.failure}: {json.dumps(schema)}")
            if play.finished:
                finished += 1
                fault = _fault(validator, play.text)
                if fault:
                    invalid += 1
                    print(f"  INVALID: {play.text[:300]!r}: {fault[:200]} under {json.dumps(schema)[:600]}")
    pool.close()
    print(f"{vocabulary.size} tokens: {len(sample)} schemas ({refused} refused), {finished} of "
          f"{len(ready_s) * answers} answers finished, {invalid} invalid; {tokens} tokens, {forced} of them forced")
    print(f"  compile: p50 {percentile(compile_s, 0.5):.2f} ms, p99 {percentile(compile_s, 0.99):.2f} ms; "
          f"ready: p50 {percentile(ready_s, 0.5):.2f} ms, p99 {percentile(ready_s, 0.99):.2f} ms")
    print(f"  mask: p50 {percentile(mask_s, 0.5):.3f} ms, p99 {percentile(mask_s, 0.99):.3f} ms, "
          f"most {percentile(mask_s, 1):.2f} ms a row")
    _together(backend, sample[:32], vocabulary)
    return invalid == 0


def _fault(validator: Any, text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError as error:
        return f"not JSON: {error}"
    return "; ".join(error.message for error in validator.iter_errors(value))


def _together(backend: Backend, sample: list[Any], vocabulary: Vocabulary, steps: int = 50) -> None:
    """Measure masks of 32 rows in one call, as in a step of the engine."""
    matchers, filler = [], backend.filler(4)
    for schema in sample:
        try:
            spec = json_grammar(schema, "schema")
            matchers.append(backend.finish(backend.prepare(spec.kind, spec.source)).matcher())
        except GrammarError:
            continue
    mask = vocabulary.new_mask(len(matchers))
    player, seconds = Player(vocabulary, 1), []
    for _ in range(steps):
        began = time.perf_counter()
        filler.fill([(matcher, row) for row, matcher in enumerate(matchers)], mask)
        seconds.append(time.perf_counter() - began)
        for row, matcher in enumerate(matchers):
            if not matcher.done:
                matcher.accept(player.choose(mask[row]))
    print(f"  {len(matchers)} rows in one call: p50 {percentile(seconds, 0.5):.2f} ms, "
          f"p99 {percentile(seconds, 0.99):.2f} ms a step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemas", type=int, default=240)
    parser.add_argument("--answers", type=int, default=3, help="drawn for each schema")
    parser.add_argument("--vocabulary", choices=("49k", "128k", "all", "none"), default="all")
    parser.add_argument("--serving", default="embedded", metavar="URL", help="of a server, `none` or `embedded`")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--passes", type=int, default=5)
    chosen = parser.parse_args()
    good = True
    if chosen.vocabulary != "none":
        small = embedded_vocabulary()
        vocabularies = {"49k": lambda: small, "128k": lambda: large_vocabulary(small)}
        sample = list(schemas(chosen.schemas))
        for name, make in vocabularies.items():
            if chosen.vocabulary in (name, "all"):
                good &= check(LLGuidance(make()), sample, chosen.answers)
    with contextlib.ExitStack() as stack:
        url = chosen.serving
        if url == "embedded":
            url = stack.enter_context(served())
        if url != "none":
            serving(url, chosen.streams, chosen.new_tokens, chosen.passes)
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
