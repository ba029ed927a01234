"""Reasoning: detected from the template and the prompt, split from the answer for any cut of the text."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.support_tools import cut
from tokenmill.errors import Unsupported
from tokenmill.text.reasoning import FORMATS, Splitter, by_name, of_template, reasoning_of

SPLIT = [form for form in FORMATS if not form.channels]
QWEN3 = "{%- if enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
HARMONY = "{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}"


@pytest.mark.parametrize("template, name", [
    (QWEN3, "think"),
    ("{% set content = content.split('</think>')[-1] %}{{'<｜Assistant｜><think>\\n'}}", "think"),
    ("First draft your thinking process … [THINK] Your thoughts [/THINK]", "magistral"),
    ("write 'Here is my thought process:' then 'Here is my response:'", "granite"),
    ("thoughts between <think></think> and write your response between <response></response>", "granite_tags"),
    ("<|START_THINKING|>plan<|END_THINKING|> <|START_RESPONSE|>{{ text }}<|END_RESPONSE|>", "command"),
    ("<seed:think>…</seed:think>", "seed"),
    (HARMONY, "harmony"),
])  # fmt: skip
def test_the_format_is_found_in_the_template(template: str, name: str) -> None:
    found = of_template(template)
    assert found is not None
    assert found.name == name


def test_a_template_without_marks_has_no_thoughts() -> None:
    assert of_template("{{ messages[0].content }}") is None
    assert reasoning_of("{{ messages[0].content }}", "<think>") is None


def test_the_prompt_says_whether_the_thought_is_open_or_over() -> None:
    model_opens = reasoning_of(QWEN3, "<|im_start|>assistant\n")
    template_opens = reasoning_of(QWEN3, "<|im_start|>assistant\n<think>\n")
    assert model_opens is not None
    assert not model_opens.already_open
    assert template_opens is not None
    assert template_opens.already_open
    assert reasoning_of(QWEN3, "<|im_start|>assistant\n<think>\n\n</think>\n\n") is None
    user_says = reasoning_of(QWEN3, "user\nWhat is <think>?\nassistant\n")
    assert user_says is not None
    assert not user_says.already_open


def test_formats_have_the_names_of_other_servers() -> None:
    assert by_name("deepseek_r1").start == "<think>"
    assert by_name("mistral").start == "[THINK]"
    forced = reasoning_of("no marks", "assistant: <think>", parser="qwen3")
    assert forced is not None
    assert forced.already_open
    with pytest.raises(Unsupported, match="granite"):
        by_name("telepathy")


def split(form_name: str, opened: bool, pieces: list[str]) -> tuple[str, str]:
    form = by_name(form_name)
    found = reasoning_of("", form.start if opened else "", parser=form_name)
    assert found is not None
    splitter = Splitter(found)
    parts = [splitter.push(piece) for piece in pieces] + [splitter.finish()]
    return "".join(thought for thought, _ in parts), "".join(rest for _, rest in parts)


@pytest.mark.parametrize("form", SPLIT, ids=lambda form: form.name)
@settings(max_examples=100, deadline=None)
@given(thought=st.text(max_size=40), answer=st.text(max_size=40), opened=st.booleans(),
       places=st.lists(st.integers(0, 1000), max_size=20))  # fmt: skip
def test_thought_and_answer_come_apart_wherever_the_text_is_cut(form, thought, answer, opened, places) -> None:
    assume(not any(mark in thought + answer for mark in (form.start, form.end, *(form.wrap or ()))))
    opening = "" if opened else f"{form.start}\n"
    before, after = form.wrap or ("", "")
    whole = f"{opening}{thought}\n{form.end}\n\n{before}{answer}{after}"
    found = split(form.name, opened, [whole])
    assert found == (thought.strip(), answer.lstrip())
    assert split(form.name, opened, cut(whole, places)) == found
    assert split(form.name, opened, list(whole)) == found


@pytest.mark.parametrize("form", SPLIT, ids=lambda form: form.name)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_marks_in_any_order_are_read_alike_in_pieces_and_lose_nothing(form, data) -> None:
    bits = st.sampled_from([form.start, form.end, *(form.wrap or ()), "\n", " ", "<", "a"])
    whole = "".join(data.draw(st.lists(bits | st.text(max_size=5), max_size=12)))
    opened = data.draw(st.booleans())
    found = split(form.name, opened, [whole])
    assert split(form.name, opened, list(whole)) == found
    together = found[0] + found[1]
    marks = (form.start, form.end, *(form.wrap or ()))
    left = whole
    for mark in marks:
        left, together = left.replace(mark, ""), together.replace(mark, "")
    assert "".join(together.split()) == "".join(left.split())


def test_marks_around_the_answer_are_taken_off_only_there() -> None:
    whole = "<think>a</think><response>b </response> c</response>\n"
    for pieces in ([whole], list(whole)):
        assert split("granite_tags", False, pieces) == ("a", "b </response> c")
    assert split("granite_tags", False, ["b </response>"]) == ("", "b </response>")


def test_an_answer_without_a_thought_is_content() -> None:
    assert split("think", False, [" Hi", " <think>"]) == ("", " Hi <think>")


def test_a_thought_that_is_cut_off_is_a_thought() -> None:
    assert split("think", True, ["I wonder </thi"]) == ("I wonder </thi", "")


def test_a_thought_is_told_as_it_comes() -> None:
    splitter = Splitter(by_name("think"))
    assert splitter.push("<think>\nOne") == ("One", "")
    assert splitter.inside
    assert splitter.push(" two </") == (" two", "")
    assert splitter.push("think>") == ("", "")
    assert not splitter.inside
    assert splitter.push("\n\n") == ("", "")
    assert splitter.push("Yes") == ("", "Yes")
    assert splitter.push(" <think>") == ("", " <think>")
