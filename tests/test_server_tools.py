"""Tools of a chat: allowed fields, inputs of the template, and calls in streams and plain answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from support_server import TEMPLATE, Server, eventually, scripted

from tokenmill.errors import ToolError, ValidationError
from tokenmill.text.chat import Chat
from tokenmill.text.chat_prompt import newer, with_tool_prompt, written_out
from tokenmill.text.chat_tools import tools_of

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a place",
        "parameters": {
            "type": "object",
            "properties": {"location": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["location"],
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
TOOLS: list[dict[str, Any]] = [WEATHER, TIME]
USER = [{"role": "user", "content": "hi"}]


def only(mode: str, *names: str) -> Any:
    """Return OpenAI's choice among some of the tools."""
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def asked(**fields: Any) -> Chat:
    return Chat(messages=USER, **fields)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ("auto", ["get_weather", "get_time"])),
        ("auto", ("auto", ["get_weather", "get_time"])),
        ("none", ("none", [])),
        ("required", ("required", ["get_weather", "get_time"])),
        ("get_time", ("function", ["get_time"])),
        ({"type": "function", "function": {"name": "get_time"}}, ("function", ["get_time"])),
        ({"function": {"name": "get_time"}}, ("function", ["get_time"])),
        ({"type": "function", "name": "get_time"}, ("function", ["get_time"])),
        (only("auto", "get_time"), ("auto", ["get_time"])),
        (only("required", "get_time", "get_weather"), ("required", ["get_weather", "get_time"])),
        ({"type": "allowed_tools", **only("required", "get_time")["allowed_tools"]}, ("required", ["get_time"])),
    ],
)
def test_a_choice_is_a_mode_or_functions(choice: Any, expected: tuple[str, list[str]]) -> None:
    tools = tools_of(asked(tools=TOOLS, tool_choice=choice))
    assert tools is not None
    assert (tools.choice, [tool["function"]["name"] for tool in tools.allowed]) == expected
    assert tools.given == TOOLS


def test_no_tools_are_none_whatever_else_is_said() -> None:
    for fields in ({}, {"tools": []}, {"tools": None, "tool_choice": "none"}, {"tool_choice": "auto"},
                   {"functions": []}, {"function_call": "none"}, {"parallel_tool_calls": True}):  # fmt: skip
        assert tools_of(asked(**fields)) is None


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": TOOLS, "tool_choice": "nothing"}, "tool_choice", "Tool with name nothing not found"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice",
         "Tool with name x not found"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice", "`name`"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "allowed_tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom", "custom": {"name": "x"}}}, "tool_choice", "'custom'"),
        ({"tools": TOOLS, "tool_choice": only("none", "get_time")}, "tool_choice", "`mode`, 'auto' or 'required'"),
        ({"tools": TOOLS, "tool_choice": only("auto")}, "tool_choice", "a list of functions"),
        ({"tools": TOOLS, "tool_choice": only("auto", "get_time", "x")}, "tool_choice", "Tool with name x not found"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": ["x"]}}},
         "tool_choice", "`name`"),
        ({"tool_choice": only("auto", "get_time")}, "tool_choice", "only allowed with `tools`"),
        ({"tool_choice": "required"}, "tool_choice", "only allowed with `tools`"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "only allowed with `tools`"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0]", "`function`"),
        ({"tools": [WEATHER, {"type": "web", "function": {"name": "x"}}]}, "tools[1]", "'web'"),
        ({"tools": [WEATHER, {"function": {"name": ""}}]}, "tools[1]", "1 to 256 characters"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1]", "two functions named 'get_weather'"),
        ({"tools": [{"function": {"name": "x", "parameters": []}}]}, "tools[0]", "JSON schema"),
        ({"tools": [{"function": {"name": "x", "description": 1}}]}, "tools[0]", "description"),
        ({"tools": [{"function": {"name": "x", "strict": "yes"}}]}, "tools[0]", "strict"),
        ({"tools": [{"function": {"name": f"f{i}"}} for i in range(129)]}, "tools", "up to 128"),
        ({"functions": [{"name": "a"}], "tools": TOOLS}, "functions", "older form"),
        ({"functions": [{"name": "a"}], "function_call": {"name": "b"}}, "function_call", "Tool with name b not found"),
        ({"functions": [{"name": "a"}], "function_call": "a"}, "function_call", "'auto', 'none'"),
        ({"function_call": {"name": "b"}}, "function_call", "only allowed with `functions`"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused_by_name(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message.replace("[", r"\[")) as caught:
        tools_of(asked(**fields))
    assert caught.value.param == param


def test_unknown_functions_have_tgis_type_of_error() -> None:
    with pytest.raises(ToolError):
        tools_of(asked(tools=TOOLS, tool_choice="x"))


def test_tgis_name_of_the_parameters_is_understood() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    tools = tools_of(asked(tools=[{"type": "function", "function": {"name": "f", "arguments": schema}}]))
    assert tools is not None
    assert tools.given == [{"type": "function", "function": {"name": "f", "parameters": schema}}]


def test_a_template_without_tools_is_told_of_them_behind_the_last_message() -> None:
    tools = tools_of(asked(tools=TOOLS))
    assert tools is not None
    (message,) = with_tool_prompt(USER, tools, None, template_has_tools=False)
    content, _, told = message["content"].partition("\n---\n")
    assert content == "hi"
    listed, _, prompt = told.partition("\n")
    assert json.loads(listed) == TOOLS
    assert '"parameters"' in prompt
    (message,) = with_tool_prompt(USER, tools, "Call one.", template_has_tools=False)
    assert message["content"].endswith("]\nCall one.")
    assert USER == [{"role": "user", "content": "hi"}]


def test_a_template_with_tools_gets_only_a_prompt_that_was_asked_for() -> None:
    tools = tools_of(asked(tools=TOOLS))
    assert tools is not None
    assert with_tool_prompt(USER, tools, None, template_has_tools=True) == USER
    assert with_tool_prompt(USER, tools, "", template_has_tools=True) == USER
    (message,) = with_tool_prompt(USER, tools, "Call one.", template_has_tools=True)
    assert message["content"] == "hi\n---\nCall one."


def test_the_prompt_goes_behind_what_the_assistant_has_not_written() -> None:
    tools = tools_of(asked(tools=TOOLS))
    assert tools is not None
    parts = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
    begun = {"role": "assistant", "content": "So"}
    first, second = with_tool_prompt([parts, begun], tools, "Call.", template_has_tools=True)
    assert first["content"] == [{"type": "text", "text": "hi"}, {"type": "text", "text": "\n---\nCall."}]
    assert second == begun
    assert with_tool_prompt([begun], tools, "Call.", template_has_tools=True) == [begun]


def test_messages_of_the_older_form_become_newer_ones() -> None:
    old = [
        *USER,
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "42"},
    ]
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert newer(old) == [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "f", "content": "42", "tool_call_id": "call_1"},
    ]


def test_calls_become_text_where_a_template_knows_none() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "é"}'}}
    broken = {"id": "2", "type": "function", "function": {"name": "g", "arguments": "{"}}
    said = {"role": "assistant", "content": "So:", "tool_calls": [call, broken]}
    (message,) = written_out([said])
    assert message == {
        "role": "assistant",
        "content": 'So:\n{"name": "f", "parameters": {"a": "é"}}\n{"name": "g", "parameters": "{"}',
    }


# --- end to end, with an engine of scripted answers -----------------------------------------------------------------

HERMES = (
    "{% if tools %}{{ tools | tojson }} <tool_call>{name, arguments}</tool_call>\n{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FIRST = {"location": "Zürich", "days": 3}
SAID = (
    "Let me look.\n<tool_call>\n" + json.dumps({"name": "get_weather", "arguments": FIRST}, ensure_ascii=False)
    + '\n</tool_call>\n<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
)  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("model")
    special = ("<tool_call>", "</tool_call>")
    with scripted(folder, text=SAID, template=HERMES, special=special, total=3000) as running:
        yield running


def chat(server: Server, **fields: Any) -> Any:
    response = server.post("/v1/chat/completions", {"messages": USER, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def streamed(server: Server, **fields: Any) -> tuple[list[Any], dict[str, Any]]:
    """Return the choices of the chunks, and the concatenation of their deltas."""
    *chunks, done = server.events("/v1/chat/completions", {"messages": USER, "stream": True, **fields})
    assert done == "[DONE]"
    choices = [chunk["choices"][0] for chunk in chunks]
    whole: dict[str, Any] = {"content": "", "tool_calls": {}}
    for i, choice in enumerate(choices):
        delta = choice["delta"]
        assert delta.get("role") == (None if i else "assistant")
        assert "content" in delta or delta["tool_calls"]  # in every chunk, as TGI's clients look for one of them
        whole["content"] += delta.get("content", "")
        for piece in delta.get("tool_calls", []):
            known = whole["tool_calls"].get(piece["index"])
            if known is None:
                assert piece["type"] == "function"
                whole["tool_calls"][piece["index"]] = {"name": piece["function"]["name"], "arguments": ""}
            else:
                assert set(piece) == {"index", "function"}
                assert set(piece["function"]) == {"arguments"}
            whole["tool_calls"][piece["index"]]["arguments"] += piece["function"]["arguments"]
    return choices, whole


def test_calls_come_back_in_openais_shape(server: Server) -> None:
    (choice,) = chat(server, tools=TOOLS)["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["content"] == "Let me look."
    first, second = message["tool_calls"]
    assert list(first) == ["id", "type", "function"]
    assert first["id"].startswith("call_")
    assert first["id"] != second["id"]
    assert (first["function"]["name"], json.loads(first["function"]["arguments"])) == ("get_weather", FIRST)
    assert second["function"] == {"name": "get_time", "arguments": "{}"}


def test_the_plain_answer_is_the_fold_of_the_stream(server: Server) -> None:
    for fields in ({}, {"max_tokens": 30}, {"max_tokens": 60}, {"stop": "get_time"}, {"parallel_tool_calls": False}):
        (choice,) = chat(server, tools=TOOLS, **fields)["choices"]
        choices, whole = streamed(server, tools=TOOLS, **fields)
        message = choice["message"]
        plain = [call["function"] for call in message.get("tool_calls", [])]
        told = [whole["tool_calls"][i] for i in sorted(whole["tool_calls"])]
        content = message["content"] or ""
        if fields.get("max_tokens") == 60:  # the stream has an incomplete call; in the plain answer it is content
            assert told.pop()["arguments"] in content
            assert content.startswith(whole["content"])
        else:
            assert content == whole["content"]
        assert told == plain
        reasons = [one["finish_reason"] for one in choices]
        assert reasons == [None] * (len(reasons) - 1) + [choice["finish_reason"]]


def test_one_call_only_if_so_asked_and_nothing_is_generated_behind_it(server: Server) -> None:
    last = SAID.index("}}") + 1  # its arguments are complete
    for fields in ({}, {"tool_choice": "auto"}, {"n": 2}, {"functions": [tool["function"] for tool in TOOLS]}):
        fields = {"parallel_tool_calls": False, **({} if "functions" in fields else {"tools": TOOLS}), **fields}
        body = chat(server, **fields)
        for choice in body["choices"]:
            message = choice["message"]
            assert message["content"] == "Let me look."
            calls = [call["function"] for call in message.get("tool_calls", [])] or [message["function_call"]]
            assert [call["name"] for call in calls] == ["get_weather"]
            assert choice["finish_reason"] == ("function_call" if "functions" in fields else "tool_calls")
        written = SAID[:last].replace("<tool_call>", "T")  # one token
        assert body["usage"]["completion_tokens"] == len(written.encode()) * len(body["choices"])
    eventually(lambda: server.metric("tgi_batch_current_size") == 0)


@pytest.mark.parametrize("choice", ["required", "get_time", {"type": "function", "function": {"name": "get_time"}}])
def test_one_call_only_where_it_is_forced(tmp_path: Any, choice: Any) -> None:
    call = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
    with scripted(tmp_path, text=f"{call}\n{call}", template=HERMES, special=("<tool_call>", "</tool_call>"),
                  total=3000) as running:  # fmt: skip
        fields = {"tools": [TIME], "tool_choice": choice, "parallel_tool_calls": False}
        (plain,) = chat(running, **fields)["choices"]
        choices, whole = streamed(running, **fields)
        wanted = {"name": "get_time", "arguments": "{}"}
        assert [made["function"] for made in plain["message"]["tool_calls"]] == [wanted]
        assert list(whole["tool_calls"].values()) == [wanted]
        assert (plain["message"]["content"], whole["content"]) == (None, "")
        assert plain["finish_reason"] == choices[-1]["finish_reason"] == "tool_calls"


def test_an_answer_that_is_cut_off_in_a_call_has_ended_by_length(server: Server) -> None:
    (choice,) = chat(server, tools=TOOLS, max_tokens=45)["choices"]
    assert choice["finish_reason"] == "length"
    assert "get_weather" in choice["message"]["content"]  # an incomplete call becomes content


def test_no_log_probability_is_lost_where_tokens_make_no_chunk(server: Server) -> None:
    body = chat(server, tools=TOOLS, logprobs=True, top_logprobs=1)
    entries = body["choices"][0]["logprobs"]["content"]
    assert len(entries) == body["usage"]["completion_tokens"]
    choices, _ = streamed(server, tools=TOOLS, logprobs=True, top_logprobs=1)
    assert len(choices) < len(entries)
    assert [entry for choice in choices for entry in choice["logprobs"]["content"]] == entries
    assert all(choice["logprobs"]["content"] for choice in choices)


def test_each_choice_is_read_by_itself(server: Server) -> None:
    body = chat(server, tools=TOOLS, n=2)
    calls = [choice["message"]["tool_calls"] for choice in body["choices"]]
    assert [[call["function"] for call in its] for its in calls] == [[call["function"] for call in calls[0]]] * 2
    assert len({call["id"] for its in calls for call in its}) == 4


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS, "tool_choice": "none"}])
def test_without_tools_nothing_is_read_as_a_call(server: Server, fields: Any) -> None:
    (choice,) = chat(server, **fields)["choices"]
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "stop"
    assert '"get_weather"' in choice["message"]["content"]
    assert "<tool_call>" not in choice["message"]["content"]  # special tokens are no text


def test_the_template_gets_tools_as_they_were_sent(server: Server) -> None:
    def templated(**fields: Any) -> str:
        response = server.post("/chat_tokenize", {"messages": USER, **fields})
        assert response.status_code == 200, response.text
        return str(response.json()["templated_text"])

    assert templated(tools=TOOLS).startswith(json.dumps(TOOLS) + " <tool_call>")
    assert templated(tools=TOOLS, tool_choice="none") == templated()
    old = templated(functions=[tool["function"] for tool in TOOLS])
    assert old == templated(tools=TOOLS)
    call = {"id": "c", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    later = templated(tools=TOOLS, messages=[
        *USER, {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "noon"},
    ])  # fmt: skip
    assert '<tool_call>{"name": "get_time", "arguments": {}}</tool_call></s><|tool|>noon' in later


def test_a_last_message_with_calls_is_whole_and_a_new_turn_begins(tmp_path: Any) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "get_time", "arguments": '{"zone": "U'}}
    written = '{"name": "get_time", "parameters": "{"zone": "U"}'
    turn = {"role": "assistant", "tool_calls": [call]}
    older = {"role": "assistant", "content": None, "function_call": call["function"]}
    with scripted(tmp_path, text=SAID, total=3000) as running:
        for message, text in (({**turn, "content": None}, ""), ({**turn, "content": "So:"}, "So:\n"), (older, "")):

            def templated(**fields: Any) -> str:
                body = {"messages": [*USER, message], **fields}  # noqa: B023 called at once
                return str(running.post("/chat_tokenize", body).json()["templated_text"])

            assert templated() == f"<|user|>hi</s><|assistant|>{text}{written}</s><|assistant|>"
            assert templated(add_generation_prompt=False) == f"<|user|>hi</s><|assistant|>{text}{written}</s>"
            assert templated(continue_final_message=True) == f"<|user|>hi</s><|assistant|>{text}{written}"


def test_every_shape_of_an_answer_can_be_sent_back(server: Server) -> None:
    asks = [{}, {"max_tokens": 45}, {"max_tokens": 1}, {"tools": TOOLS}, {"tools": TOOLS, "max_tokens": 45},
            {"tools": TOOLS, "stop": "Let"}, {"functions": [TIME["function"]]},
            {"tools": TOOLS, "tool_choice": "none"}]  # fmt: skip
    for fields in asks:
        message = chat(server, **fields)["choices"][0]["message"]
        for sent in (message, {**dict.fromkeys(("refusal", "tool_calls", "function_call", "name")), **message}):
            assert chat(server, messages=[*USER, sent, *USER], **fields)["usage"]["completion_tokens"]


def test_the_older_form_has_a_function_call(server: Server) -> None:
    functions = [tool["function"] for tool in TOOLS]
    (choice,) = chat(server, functions=functions)["choices"]
    assert choice["finish_reason"] == "function_call"
    call = choice["message"]["function_call"]
    assert (call["name"], json.loads(call["arguments"])) == ("get_weather", FIRST)
    assert "tool_calls" not in choice["message"]
    *chunks, _ = server.events("/v1/chat/completions", {"messages": USER, "functions": functions, "stream": True})
    pieces = [d["function_call"] for chunk in chunks if "function_call" in (d := chunk["choices"][0]["delta"])]
    assert pieces[0]["name"] == "get_weather"
    assert "".join(piece["arguments"] for piece in pieces) == call["arguments"]


def test_a_call_is_told_as_json_where_the_answer_is_a_text(server: Server) -> None:
    """TGI's clients of Vertex AI read calls in predictions. A text has the form of its own instance."""
    chat_alone = {"messages": USER, "max_tokens": 200}
    instances = [{**chat_alone, "tools": TOOLS}, chat_alone, {**chat_alone, "tools": TOOLS, "max_tokens": 20},
                 {**chat_alone, "functions": [tool["function"] for tool in TOOLS], "tool_choice": "auto"},
                 {**chat_alone, "tools": TOOLS, "tool_choice": "none"}]  # fmt: skip
    response = server.post("/vertex", {"instances": instances})
    assert response.status_code == 200, response.text
    called, text, cut, older, unasked = response.json()["predictions"]
    assert called == older
    assert json.loads(called) == {"function": {"_name": "get_weather", **FIRST}}
    assert called.startswith('{"function": {"_name": "get_weather", "location": "Zürich"')
    assert text == unasked == SAID.replace("<tool_call>", "").replace("</tool_call>", "")
    assert text.startswith(cut)
    refused = server.post("/vertex", {"instances": [{**chat_alone, "tools": TOOLS, "tool_choice": "x"}]})
    assert (refused.status_code, refused.json()["error_type"]) == (422, "tool_error")


def test_a_parser_can_be_chosen_and_must_exist(tmp_path: Any) -> None:
    with scripted(tmp_path, "--tool-call-parser", "hermes", text=SAID, special=("<tool_call>", "</tool_call>"),
                  template=TEMPLATE, total=3000) as running:  # fmt: skip
        (choice,) = chat(running, tools=TOOLS)["choices"]
        assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["get_weather", "get_time"]
    server = Server(tmp_path, 0, "--tool-call-parser", "morse", wait=False)
    log = server.log()
    assert server.process.returncode == 1
    assert "The tool-call parser 'morse' is not supported. Supported: " in log
