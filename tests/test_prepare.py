# ruff: noqa: E501 - one rule a line
from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support_text import byte_level

from tokenmill.errors import ContextLengthError, GrammarError, ValidationError
from tokenmill.text.options import Options, RequestLimits, ThoughtLimit
from tokenmill.text.prepare import Prepared, check_before_queue, prepare
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.wire.messages import GrammarSpec

TOKENIZER = Tokenizer(byte_level(), eos_ids=(2, 0, 9999))
LIMITS = RequestLimits(
    max_input_tokens=15, max_total_tokens=20, max_stop_sequences=4, max_best_of=2, max_top_n_tokens=5, vocab_size=600,
    grammars=True,
)  # fmt: skip
WIDE = RequestLimits(
    max_input_tokens=3999,
    max_total_tokens=4000,
    max_stop_sequences=4,
    max_best_of=2,
    max_top_n_tokens=5,
    vocab_size=600,
)


def made(
    prompt: Any = "abc", limits: RequestLimits = LIMITS, dialect: Any = "native", stream: bool = False, **options: Any
) -> Prepared:
    return prepare(prompt, Options(**options), limits, TOKENIZER, dialect=dialect, stream=stream)


def refused(prompt: Any = "abc", **options: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        made(prompt, **options)
    return str(caught.value)


NATIVE = [
    ({"stream": True, "best_of": 2}, "`best_of` != 1 is not supported when streaming tokens"),
    ({"stream": True, "best_of": 0}, "`best_of` != 1 is not supported when streaming tokens"),
    ({"stream": True, "prompt_logprobs": 0}, "`decoder_input_details` == true is not supported when streaming tokens"),
    ({"best_of": 3, "do_sample": True}, "`best_of` must be > 0 and <= 2. Given: 3"),
    ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    ({"best_of": 2, "temperature": 0.0}, "you must use sampling when `best_of` is > 1"),
    ({"temperature": -0.5}, "`temperature` must be strictly positive"),
    ({"temperature": float("inf")}, "`temperature` must be strictly positive"),
    ({"repetition_penalty": 0.0}, "`repetition_penalty` must be strictly positive"),
    ({"frequency_penalty": 2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"presence_penalty": -2.1}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
    ({"top_p": 0.0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"top_p": 1.01}, "`top_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 0.0}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 1.5}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"min_p": 1.5}, "`min_p` must be >= 0.0 and <= 1.0"),
    ({"top_k": 0}, "`top_k` must be strictly positive"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ({"stop": ("a",) * 5}, "`stop` supports up to 4 stop sequences. Given: 5"),
    ({"stop": ("",)}, "`stop` must not contain an empty string"),
    ({"stop": ("a" * 1025,)}, "`stop` supports strings of up to 1024 characters. Given: 1025"),
    ({"best_of": 2, "do_sample": True, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
    ({"seed": -1}, "`seed` must be >= 0 and < 2^64. Given: -1"),
    ({"seed": 2**64}, f"`seed` must be >= 0 and < 2^64. Given: {2**64}"),
    ({"logprobs": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    ({"logit_bias": {600: 1.0}}, "`logit_bias` must have token ids from 0 to 599. Given: 600"),
    ({"logit_bias": {1: 100.5}}, "`logit_bias` must be >= -100 and <= 100. Given: 100.5"),
    ({"adapter_id": "x"}, "`adapter_id` 'x' is unknown: no adapters are loaded"),
    ({"prompt": ""}, "`inputs` cannot be empty"),
    ({"prompt": []}, "`inputs` cannot be empty"),
    ({"truncate": 0}, "`truncate` must be strictly positive and less than 15. Given: 0"),
    ({"truncate": 16}, "`truncate` must be strictly positive and less than 15. Given: 16"),
    ({"prompt": "\ud800"}, "tokenizer error: the text has characters that cannot be written in UTF-8"),
    ({"prompt": [5, 600]}, "`inputs` has token id 600; ids are 0 to 599"),
    ({"prompt": [5] * 12, "max_new_tokens": 9}, "`inputs` tokens + `max_new_tokens` must be <= 20. Given: 12 `inputs` tokens and 9 `max_new_tokens`"),
    ({"prompt": [5] * 21}, "`inputs` tokens + `max_new_tokens` must be <= 20. Given: 21 `inputs` tokens and 0 `max_new_tokens`"),
    ({"prompt": [5] * 16}, "`inputs` must have less than 15 tokens. Given: 16"),
    ({"min_new_tokens": 5, "max_new_tokens": 4}, "`min_new_tokens` must be <= `max_new_tokens`. Given: 5 and 4"),
    ({"grammar": {"type": "x", "value": "a"}}, "grammar is not valid: `type` must be one of json, json_object, regex, json_schema. Given: x"),
    ({"grammar": {"type": "json"}}, "grammar is not valid: `value` is missing"),
    ({"grammar": {"type": "regex", "value": 1}}, "grammar is not supported"),
    ({"grammar": {"type": "regex", "value": "a"}, "ignore_eos": True}, "`ignore_eos` must not be set with a grammar. Given: True"),
    ({"grammar": {"type": "regex", "value": "a"}, "min_new_tokens": 2}, "`min_new_tokens` must not be set with a grammar. Given: 2"),
]  # fmt: skip
"""In the order in which they are checked."""


@pytest.mark.parametrize(("options", "message"), NATIVE)
def test_a_broken_rule_is_told_in_tgis_words(options: dict[str, Any], message: str) -> None:
    assert refused(**options) == message


@pytest.mark.parametrize("first", range(len(NATIVE)))
def test_the_first_rule_broken_wins(first: int) -> None:
    for options, message in NATIVE[first + 1 :]:
        both = {**options, **NATIVE[first][0]}
        if any(name in NATIVE[first][0] for name in options) or "best_of" in options or "best_of" in both:
            continue
        if options.get("prompt") or "min_new_tokens" in options or message.startswith("`inputs` tokens"):
            continue  # these need a prompt or a length that the other forbids
        assert refused(**both) == NATIVE[first][1], message


def test_a_server_without_grammars_says_so() -> None:
    without = msgspec.structs.replace(LIMITS, grammars=False)
    for grammar in ({"type": "regex", "value": "a"}, {"type": "x"}):
        with pytest.raises(GrammarError, match=r"^grammar is not supported$"):
            made(grammar=grammar, limits=without)


def test_a_grammar_is_made_canonical_and_goes_on_as_it_is() -> None:
    spec = GrammarSpec("regex", "a+", ((1, 2),))
    assert made(grammar=spec).grammar == spec
    assert made(grammar={"type": "json", "value": '{"type": "object"}'}).grammar == GrammarSpec(
        "json_schema", '{"type":"object"}'
    )
    assert made().grammar is None
    tokenizer = Tokenizer(byte_level(), eos_ids=(64, 2))  # the first is a character, which grammars use as text
    ends = [prepare("a", Options(grammar=g), LIMITS, tokenizer).stopping.stop_ids for g in (None, spec)]
    assert ends == [(64, 2), (2,)]


def test_a_thought_that_takes_too_long_is_ended_as_the_options_say() -> None:
    thought = ThoughtLimit(3, (7, 8), ((8,),))
    stopping = made(thought=thought, thinking_budget=3).stopping
    assert (stopping.force_after, stopping.forced_ids, stopping.unless) == (3, (7, 8), ((8,),))
    assert refused(thinking_budget=-1) == "`thinking_budget` must be between 0 and 2147483647. Given: -1"


def test_one_place_only_means_best_of_is_off() -> None:
    one = RequestLimits(15, 20, 4, 1, 5, 600)
    with pytest.raises(ValidationError, match=r"^`best_of` != 1 is not allowed for this endpoint$"):
        check_before_queue(Options(best_of=2), one, stream=False)
    check_before_queue(Options(best_of=1), one, stream=True)
    check_before_queue(Options(best_of=0), one, stream=False)


OPENAI = [
    ({"temperature": -1.0}, "temperature", "Invalid 'temperature': it must be 0 or more. Given: -1.0."),
    ({"max_new_tokens": 0}, "max_tokens", "Invalid 'max_tokens': it must be 1 or more. Given: 0."),
    ({"logprobs": 21}, "top_logprobs", "Invalid 'top_logprobs': it must be between 0 and 20. Given: 21."),
    (
        {"logit_bias": {-1: 1.0}},
        "logit_bias",
        "Invalid 'logit_bias': it must be of token ids from 0 to 599. Given: -1.",
    ),
    ({"prompt": ""}, "prompt", "Invalid 'prompt': it must be not empty."),
    ({"stop": ("a",) * 5}, "stop", "Invalid 'stop': it must be at most 4 strings. Given: 5."),
    ({"stream": True, "best_of": 2}, "best_of", "Invalid 'best_of': it must be 1 in a stream. Given: 2."),
]


@pytest.mark.parametrize(("options", "param", "message"), OPENAI)
def test_openais_routes_name_the_field_as_openai_does(options: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        made(dialect="openai", **options)
    assert (caught.value.param, str(caught.value)) == (param, message)


def test_openais_routes_say_how_long_is_too_long() -> None:
    with pytest.raises(
        ContextLengthError, match=r"maximum context length is 20 tokens.*21 tokens \(12 in the prompt, 9 in"
    ):
        made([5] * 12, dialect="openai", max_new_tokens=9)
    with pytest.raises(ContextLengthError, match=r"prompts of at most 15 tokens.*your prompt has 16 tokens"):
        made([5] * 16, dialect="openai")
    with pytest.raises(ContextLengthError, match=r"your prompt has 30 tokens"):
        made([5] * 30, dialect="openai")


def test_of_a_text_that_is_far_too_long_no_more_is_encoded_than_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    encode = Tokenizer.encode
    monkeypatch.setattr(
        Tokenizer, "encode", lambda self, text, special=True: encoded.append(len(text)) or encode(self, text, special)
    )
    text = "1" * 1_000_000
    with pytest.raises(ContextLengthError, match=r"Given: at least \d+ `inputs` tokens and 7 `max_new_tokens`$"):
        made(text, WIDE, max_new_tokens=7)
    with pytest.raises(ContextLengthError, match=r"your prompt has at least \d+ tokens\."):
        made(text, WIDE, "openai")
    with pytest.raises(ContextLengthError, match=r"at least \d+ tokens \(at least \d+ in the prompt, 7 in the"):
        made(text, WIDE, "openai", max_new_tokens=7)
    assert sum(encoded) < 3 * 50_000
    assert made(text, WIDE, truncate=3).num_prompt == 3


@pytest.mark.parametrize("more", [0, 1])
def test_a_long_text_of_few_tokens_is_counted_to_the_token(more: int) -> None:
    inner = byte_level()
    word = "<|a special token whose text is rather long, so that cutting it makes many|>"
    inner.add_special_tokens([word])
    tokenizer = Tokenizer(inner)
    limits = msgspec.structs.replace(WIDE, vocab_size=601)
    text = word * (WIDE.max_input_tokens + more)
    if more:
        with pytest.raises(ContextLengthError, match="Given: 4000 `inputs` tokens"):
            prepare(text, Options(max_new_tokens=1), limits, tokenizer)
    else:
        assert prepare(text, Options(max_new_tokens=1), limits, tokenizer).num_prompt == WIDE.max_input_tokens


def test_what_tgi_refuses_without_need_means_off() -> None:
    found = made(top_p=1.0, typical_p=1.0, temperature=1.0, min_p=0.0).sampling
    assert (found.top_p, found.typical_p, found.greedy) == (1.0, 1.0, True)
    assert made(dialect="openai", top_k=-1).sampling.top_k == 0
    assert made(dialect="openai", top_k=0).sampling.top_k == 0


@pytest.mark.parametrize(
    ("dialect", "options", "temperature"),
    [
        ("native", {}, 0.0),
        ("native", {"do_sample": True}, 1.0),
        ("native", {"do_sample": False, "temperature": 1.0}, 0.0),
        ("native", {"temperature": 0.7}, 0.7),
        ("native", {"top_k": 3}, 1.0),
        ("native", {"top_p": 0.9}, 1.0),
        ("native", {"typical_p": 0.9}, 1.0),
        ("native", {"min_p": 0.1}, 1.0),
        ("native", {"do_sample": True, "temperature": 0.0, "top_p": 0.5}, 0.0),
        ("native", {"do_sample": True, "temperature": 1e-30}, 1e-5),
        ("openai", {}, 1.0),
        ("openai", {"temperature": 0.0, "top_p": 0.5}, 0.0),
        ("openai", {"temperature": 2.0}, 2.0),
        ("openai", {"do_sample": False}, 0.0),
    ],
)
def test_who_samples_is_decided_once(dialect: Any, options: dict[str, Any], temperature: float) -> None:
    found = made(dialect=dialect, **options)
    assert found.sampling.temperature == temperature
    assert (found.seed is None) == (temperature == 0.0)
    assert found.sampling.seed == (found.seed or 0)


def test_a_seed_is_kept_or_drawn() -> None:
    assert made(do_sample=True, seed=7).seed == 7
    assert made(do_sample=True, seed=2**64 - 1).sampling.seed == 2**64 - 1
    assert made(dialect="openai", seed=-1).seed == 2**64 - 1
    assert made(seed=7).seed is None, "a greedy request has none, even if one was sent"
    assert len({made(do_sample=True).seed for _ in range(5)}) == 5


def test_every_field_is_final() -> None:
    bias = {7: -1.5, 3: 2.0}
    found = made(
        do_sample=True, top_k=4, repetition_penalty=1.2, frequency_penalty=0.5, presence_penalty=-0.5, logit_bias=bias,
        logprobs=2, prompt_logprobs=0, stop=("x", "y"), max_new_tokens=3, min_new_tokens=2, raw_logprobs=True,
    )  # fmt: skip
    s = found.sampling
    assert (s.top_k, s.repetition_penalty, s.frequency_penalty, s.presence_penalty) == (4, 1.2, 0.5, -0.5)
    assert (s.logit_bias, s.logprobs, s.prompt_logprobs, s.raw_logprobs) == (((3, 2.0), (7, -1.5)), 2, 0, True)
    assert (found.stopping.max_new_tokens, found.stopping.min_new_tokens, found.stop) == (3, 2, ("x", "y"))
    assert found.stopping.stop_ids == (2, 0), "an end that the model's table lacks is no end"
    assert made(ignore_eos=True).stopping.stop_ids == ()
    assert made().sampling.raw_logprobs is False
    assert made(dialect="openai").sampling.raw_logprobs is True
    assert made(top_k=600).sampling.top_k == 0, "as many as there are is no restriction"


def test_the_prompts_end_is_what_truncation_keeps() -> None:
    assert made(list(range(30, 60)), truncate=4).prompt_ids == (56, 57, 58, 59)
    assert made([5] * 3, truncate=4).num_prompt == 3
    text = "abc def"
    assert made(text, truncate=2).prompt_ids == tuple(TOKENIZER.encode(text)[-2:])


def test_special_tokens_are_added_only_if_asked() -> None:
    inner = byte_level()
    inner.post_processor = __import__("tokenizers").processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer = Tokenizer(inner)
    assert prepare("a", Options(), LIMITS, tokenizer).prompt_ids[0] == 1
    assert prepare("a", Options(), LIMITS, tokenizer, add_special_tokens=False).prompt_ids[0] != 1


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4100), st.none() | st.integers(1, 5000))
def test_what_is_accepted_fits_and_what_each_api_accepts_is_accepted(num_prompt: int, wished: int | None) -> None:
    total = WIDE.max_total_tokens
    for dialect, most in (("native", 1024), ("openai", 5000)):
        checked = min(wished or 0, most)
        accepted = num_prompt <= WIDE.max_input_tokens and num_prompt + checked <= total
        try:
            found = made([5] * num_prompt, WIDE, dialect, max_new_tokens=wished)
        except ContextLengthError:
            assert not accepted
            continue
        assert accepted
        room = total - num_prompt
        assert found.stopping.max_new_tokens == (room if wished is None else min(wished, room))


def test_limits_themselves_are_allowed() -> None:
    assert made([5] * 15, max_new_tokens=5).num_prompt == 15
    assert made([5] * 15, truncate=15).stopping.max_new_tokens == 5
    assert made(stop=("a" * 1024,) * 4, frequency_penalty=-2.0, logit_bias={599: -100.0, 0: 100.0}, logprobs=5).stop
    assert made(best_of=2, do_sample=True).seed is not None


def test_a_context_without_room_for_a_single_token_is_refused() -> None:
    tight = RequestLimits(20, 20, 4, 2, 5, 600)
    with pytest.raises(ContextLengthError):
        prepare([5] * 20, Options(), tight, TOKENIZER)
