"""The `/v1` routes, against the real server with the mock engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support_server import TEXT, Server, scripted


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with scripted(tmp_path_factory.mktemp("model")) as running:
        yield running


USER = [{"role": "user", "content": "hi"}]
NUM_TOKENS = len(TEXT.encode()) + 1


def chat(server: Server, **fields: Any) -> Any:
    response = server.post("/v1/chat/completions", {"messages": USER, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def complete(server: Server, **fields: Any) -> Any:
    response = server.post("/v1/completions", {"prompt": "ab", **fields})
    assert response.status_code == 200, response.text
    return response.json()


def refusal(server: Server, path: str, **fields: Any) -> Any:
    base = {"messages": USER} if "chat" in path else {"prompt": "ab"}
    response = server.post(path, {**base, **fields})
    assert response.status_code == 400, (response.status_code, response.text)
    body = response.json()
    assert set(body) == {"error", "error_type"}
    assert list(body["error"]) == ["message", "type", "param", "code"]
    return body["error"]


def test_a_chat_answer_has_openais_shape(server: Server) -> None:
    body = chat(server)
    assert list(body) == ["object", "id", "created", "model", "system_fingerprint", "choices", "usage"]
    assert body["id"].startswith("chatcmpl-")
    assert body["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": TEXT}, "logprobs": None, "finish_reason": "stop"}
    ]
    prompt = len("<|user|>hi") + 1 + len("<|assistant|>")  # `</s>` is one token, the rest are bytes
    assert body["usage"] == {
        "prompt_tokens": prompt, "completion_tokens": NUM_TOKENS, "total_tokens": prompt + NUM_TOKENS,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip


def test_ids_differ_and_the_model_is_echoed(server: Server) -> None:
    first, second = chat(server, max_tokens=1), chat(server, max_tokens=1, model="http://x/y")
    assert first["id"] != second["id"]
    assert second["model"] == "http://x/y"
    assert chat(server, max_tokens=1, model="tgi")["model"] == first["model"]


def test_a_stream_is_the_plain_answer_in_pieces(server: Server) -> None:
    body = {"messages": USER, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage, done = server.events("/v1/chat/completions", body)
    assert done == "[DONE]"
    plain = chat(server)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]
    assert len(chunks) == NUM_TOKENS
    assert (
        "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
        == plain["choices"][0]["message"]["content"]
    )
    assert [chunk["choices"][0]["delta"].get("role") for chunk in chunks] == ["assistant"] + [None] * (NUM_TOKENS - 1)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (NUM_TOKENS - 1) + ["stop"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in [*chunks, usage]}) == 1


@pytest.mark.parametrize("fields", [{"n": 3}, {"stop": "Zw"}, {"stop": "Z"}, {"max_tokens": 1}, {"logprobs": True}])
def test_each_choices_first_chunk_alone_has_the_role(server: Server, fields: dict[str, Any]) -> None:
    body = {"messages": USER, "stream": True, "stream_options": {"include_usage": True}, **fields}
    *chunks, usage, _ = server.events("/v1/chat/completions", body)
    assert usage["choices"] == []
    begun: set[int] = set()
    for (choice,) in (chunk["choices"] for chunk in chunks):
        assert choice["delta"] == {
            **({} if choice["index"] in begun else {"role": "assistant"}), "content": choice["delta"]["content"]
        }  # fmt: skip
        begun.add(choice["index"])
    assert sorted(begun) == list(range(fields.get("n", 1)))


def test_a_stream_without_options_has_no_usage_chunk(server: Server) -> None:
    body = {"messages": USER, "stream": True, "stream_options": None, "max_tokens": 2}
    events = server.events("/v1/chat/completions", body)
    assert [e if e == "[DONE]" else len(e["choices"]) for e in events] == [1, 1, "[DONE]"]


@pytest.mark.parametrize("stop", ["ämp", ["quer", "ämp"]])
def test_a_stop_string_is_not_part_of_the_text_not_even_in_a_stream(server: Server, stop: Any) -> None:
    choice = chat(server, stop=stop)["choices"][0]
    assert choice["message"]["content"] == "Zwölf Boxk"
    assert choice["finish_reason"] == "stop"
    *chunks, _ = server.events("/v1/chat/completions", {"messages": USER, "stop": stop, "stream": True})
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "Zwölf Boxk"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_text_held_back_for_a_stop_string_comes_at_the_end(server: Server) -> None:
    choice = chat(server, stop="Boxer", max_tokens=len("Zwölf Box".encode()))["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Zwölf Box", "length")


def test_max_completion_tokens_beats_max_tokens(server: Server) -> None:
    assert chat(server, max_tokens=9, max_completion_tokens=2)["usage"]["completion_tokens"] == 2


def test_n_choices_share_the_prompt(server: Server) -> None:
    one, body = chat(server, max_tokens=3), chat(server, n=3, max_tokens=3)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == 9
    assert body["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]
    *chunks, _ = server.events("/v1/chat/completions", {"messages": USER, "n": 2, "max_tokens": 3, "stream": True})
    assert sorted(chunk["choices"][0]["index"] for chunk in chunks) == [0, 0, 0, 1, 1, 1]


def test_log_probabilities_come_with_bytes_and_alternatives(server: Server) -> None:
    body = chat(server, logprobs=True, top_logprobs=2, max_tokens=3)
    content = body["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[90], [119], [0xC3]]
    assert content[0]["token"] == "Z"
    assert content[0]["logprob"] == -0.25
    assert [len(entry["top_logprobs"]) for entry in content] == [2, 2, 2]
    *chunks, _ = server.events(
        "/v1/chat/completions", {"messages": USER, "logprobs": True, "top_logprobs": 2, "max_tokens": 3, "stream": True}
    )
    assert [chunk["choices"][0]["logprobs"]["content"] for chunk in chunks] == [[entry] for entry in content]


def test_the_last_message_of_the_assistant_is_continued(server: Server) -> None:
    messages = [*USER, {"role": "assistant", "content": "Zw"}]
    tokens = server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1}).json()["usage"][
        "prompt_tokens"
    ]
    assert tokens == len("<|user|>hi") + 1 + len("<|assistant|>Zw")
    body = {"messages": messages, "max_tokens": 1, "continue_final_message": False, "add_generation_prompt": True}
    more = server.post("/v1/chat/completions", body).json()["usage"]["prompt_tokens"]
    assert more == tokens + 1 + len("<|assistant|>")


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": None, "refusal": ""}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": "x", "refusal": 1}]}, "messages[0].refusal"),
        ({"messages": [{"role": "assistant", "content": "x", "reasoning": ["y"]}]}, "messages[0].reasoning"),
        ({"messages": [{"role": "assistant", "content": [{"type": "refusal"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages[0].content"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}], "guided_regex": "a+"}, "guided_regex"),
        ({"thinking_budget": 5}, "thinking_budget"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json"}}, "response_format.value"),
        ({"guided_json": {"type": "object", "properties": {"a": {"not": {"const": 1}}}}}, "guided_json"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"functions": [{"description": "f"}]}, "functions[0]"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
         "messages[0].content"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": 3}]}, "messages[0].tool_call_id"),
        ({"store": True}, "store"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"audio": {"voice": "x", "format": "wav"}}, "audio"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"verbosity": "low"}, "verbosity"),
        ({"prompt_cache_retention": "24h"}, "prompt_cache_retention"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"metadata": {"x": 1}}, "metadata.x"),
        ({"metadata": {"x": "y" * 513}}, "metadata"),
        ({"model": "m" * 1025}, "model"),
        ({"response_format": {}}, "response_format"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"truncate": 0}, "truncate"),
        ({"n": 1000}, "n"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_the_fields_name(server: Server, fields: dict[str, Any], param: str) -> None:
    error = refusal(server, "/v1/chat/completions", **fields)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "message, text",
    [
        ({"content": None, "refusal": "No."}, "No."),
        ({"content": [{"type": "refusal", "refusal": "No."}, {"type": "text", "text": "Yes."}]}, "No.Yes."),
        ({"content": "Yes.", "refusal": None, "tool_calls": None, "audio": None}, "Yes."),
        ({"content": None, "reasoning": "Hm"}, ""),
        ({"content": ""}, ""),
    ],
)
def test_answers_of_any_kind_are_part_of_a_conversation(server: Server, message: Any, text: str) -> None:
    body = {"messages": [*USER, {"role": "assistant", **message}, *USER]}
    templated = server.post("/chat_tokenize", body).json()["templated_text"]
    assert templated == f"<|user|>hi</s><|assistant|>{text}</s><|user|>hi</s><|assistant|>"


def test_fields_that_change_nothing_are_taken(server: Server) -> None:
    chat(server, max_tokens=1, user="u" * 1024, metadata={str(i): "b" * 512 for i in range(16)},
         parallel_tool_calls=True, tools=[], tool_choice="none",
         response_format={"type": "text"}, modalities=["text"], top_p=1, temperature=0, logit_bias={}, seed=-3,
         stop=None,
         presence_penalty=0.5, frequency_penalty=-0.5, repetition_penalty=1.1, min_p=0.1, top_k=5, n=1,
         store=False, service_tier="auto", logprobs=False, safety_identifier="s", prompt_cache_key="k",
         prompt_cache_retention="in_memory", functions=[], function_call="none", model="m" * 1024)  # fmt: skip


def test_the_service_tier_is_returned_if_the_request_names_one(server: Server) -> None:
    assert "service_tier" not in chat(server, max_tokens=1)
    assert chat(server, max_tokens=1, service_tier="flex")["service_tier"] == "default"
    *chunks, _ = server.events(
        "/v1/chat/completions", {"messages": USER, "max_tokens": 2, "stream": True, "service_tier": "auto"}
    )
    assert [chunk["service_tier"] for chunk in chunks] == ["default", "default"]


def test_a_developer_speaks_as_the_system_where_the_template_knows_no_other(server: Server) -> None:
    def prompt_tokens(role: str) -> int:
        messages = [{"role": role, "content": "x"}, *USER]
        return int(chat(server, max_tokens=1, messages=messages)["usage"]["prompt_tokens"])

    assert prompt_tokens("developer") == prompt_tokens("system") == prompt_tokens("tool") + 2


def test_twenty_alternatives_are_told(server: Server) -> None:
    body = chat(server, logprobs=True, top_logprobs=20, max_tokens=2)
    for entry in body["choices"][0]["logprobs"]["content"]:
        assert len(entry["top_logprobs"]) == 20
        assert entry["top_logprobs"][0]["token"] == entry["token"]


def test_bytes_that_are_no_text_are_written_as_openai_writes_them(server: Server) -> None:
    content = chat(server, logprobs=True, max_tokens=4)["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["Z", "w", "\\xc3", "\\xb6"]
    logprobs = complete(server, logprobs=0, max_tokens=5)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["Z", "w", "bytes:\\xc3", "bytes:\\xb6", "l"]
    assert logprobs["text_offset"] == [0, 1, 2, 2, 3]
    held = complete(server, logprobs=0, max_tokens=9, stop="Boxer")["choices"][0]["logprobs"]
    assert held["text_offset"] == [0, 1, 2, 2, 3, 4, 5, 6, 7]  # though "Bo" may have become a stop string


def test_no_stop_string_ends_an_answer_before_its_least_number_of_tokens(server: Server) -> None:
    """Each of the two bytes of "ö" is a token."""
    for least, text in ((0, "Zw"), (3, "Zw"), (4, "Zwölf Boxk"), (13, "Zwölf Boxk"), (500 - 40, TEXT)):
        fields = {"stop": ["ö", "ämp"], "min_tokens": least, "max_tokens": 460}
        choice = chat(server, **fields)["choices"][0]
        assert choice["message"]["content"][: len(text)] == text
        assert len(choice["message"]["content"]) == len(text) or least > NUM_TOKENS
        assert complete(server, **fields)["choices"][0]["text"] == choice["message"]["content"]
        *chunks, _ = server.events("/v1/chat/completions", {"messages": USER, **fields, "stream": True})
        assert "".join(c["choices"][0]["delta"]["content"] for c in chunks) == choice["message"]["content"]


def test_a_stop_string_is_kept_if_asked(server: Server) -> None:
    choice = chat(server, stop="ämp", include_stop_str_in_output=True)["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Zwölf Boxkämp", "stop")


def test_a_truncated_prompt_is_told(server: Server) -> None:
    body = complete(server, prompt="abcdef", truncate=4, echo=True, max_tokens=1)
    assert body["choices"][0]["text"] == "cdefZ"
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 0, "truncated_tokens": 2}
    assert complete(server, truncate=4, max_tokens=1)["usage"]["prompt_tokens_details"]["truncated_tokens"] == 0


def test_a_prompt_beyond_the_context_is_named_as_openai_does(server: Server) -> None:
    error = refusal(server, "/v1/chat/completions", messages=[{"role": "user", "content": "x" * 600}])
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "499" in error["message"]


def test_more_tokens_than_fit_are_refused_with_both_numbers(server: Server) -> None:
    error = refusal(server, "/v1/completions", max_tokens=499)
    assert error["code"] == "context_length_exceeded"
    assert "500 tokens" in error["message"]
    assert "501 tokens (2 in the prompt, 499 in the completion)" in error["message"]
    assert complete(server, max_tokens=498, stop=" ")["usage"]["prompt_tokens"] == 2


def test_a_body_of_the_wrong_shape_is_400(server: Server) -> None:
    assert refusal(server, "/v1/chat/completions", messages="x")["type"] == "invalid_request_error"
    assert refusal(server, "/v1/chat/completions", max_tokens="x")["type"] == "invalid_request_error"
    assert refusal(server, "/v1/completions", prompt=3)["type"] == "invalid_request_error"


def test_a_template_that_cannot_render_is_a_template_error(server: Server) -> None:
    body = {"messages": USER, "chat_template_kwargs": {"messages": []}}
    response = server.post("/v1/chat/completions", body)
    assert (response.status_code, response.json()["error_type"]) == (400, "template_error")


def test_a_completion_has_openais_shape(server: Server) -> None:
    body = complete(server, max_tokens=3)
    assert list(body) == ["object", "id", "created", "model", "system_fingerprint", "choices", "usage"]
    assert body["choices"] == [{"index": 0, "text": "Zw", "logprobs": None, "finish_reason": "length"}]
    assert body["usage"]["prompt_tokens"] == 2


def test_several_prompts_and_token_ids_are_answered_in_order(server: Server) -> None:
    body = complete(server, prompt=["a", "bcd"], max_tokens=2, echo=True)
    assert [(c["index"], c["text"]) for c in body["choices"]] == [(0, "aZw"), (1, "bcdZw")]
    assert body["usage"]["prompt_tokens"] == 4
    ids = [token["id"] for token in server.post("/tokenize", {"inputs": "hey"}).json()]
    assert complete(server, prompt=ids, max_tokens=2, echo=True)["choices"][0]["text"] == "heyZw"
    assert [c["text"] for c in complete(server, prompt=[ids, ids[:1]], max_tokens=1, echo=True)["choices"]] == [
        "heyZ",
        "hZ",
    ]


def test_a_completion_stream_interleaves_its_prompts(server: Server) -> None:
    body = {
        "prompt": ["a", "b"],
        "max_tokens": 3,
        "stream": True,
        "echo": True,
        "stream_options": {"include_usage": True},
    }
    *chunks, usage, done = server.events("/v1/completions", body)
    assert done == "[DONE]"
    assert usage["usage"]["completion_tokens"] == 6
    for index, text in ((0, "aZw"), (1, "bZw")):
        its = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in its) == text
        assert [choice["finish_reason"] for choice in its] == [None, None, "length"]


def test_completion_log_probabilities_are_parallel_lists(server: Server) -> None:
    logprobs = complete(server, max_tokens=2, logprobs=1, echo=True)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "Z", "w"]
    assert logprobs["token_logprobs"] == [None, -0.25, -0.25, -0.25]
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert logprobs["top_logprobs"] == [None, {"b": -0.25}, {"Z": -0.25}, {"w": -0.25}]


def test_the_prompt_alone_can_be_scored(server: Server) -> None:
    body = complete(server, max_tokens=0, logprobs=1, echo=True)
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -0.25]
    assert body["usage"] | {"prompt_tokens_details": 0} == {
        "prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2, "prompt_tokens_details": 0
    }  # fmt: skip
    assert complete(server, max_tokens=0)["choices"][0]["text"] == ""
    asked = {"prompt": "ab", "max_tokens": 0, "logprobs": 1, "echo": True, "stream": True}
    (chunk, _) = server.events("/v1/completions", asked)
    assert chunk["choices"] == body["choices"]


@pytest.mark.parametrize("fields", [{}, {"stop": "ämp"}, {"echo": True, "n": 2}, {"prompt": ["a", "ü", "c"]}])
def test_a_completion_stream_is_the_plain_answer_in_pieces(server: Server, fields: dict[str, Any]) -> None:
    asked = {"prompt": "ab", "logprobs": 2, "max_tokens": 30, "seed": 1, **fields}
    plain = server.post("/v1/completions", asked).json()["choices"]
    *chunks, _ = server.events("/v1/completions", {**asked, "stream": True})
    folded = [{"index": c["index"], "text": "", "logprobs": dict.fromkeys(c["logprobs"], ())} for c in plain]
    for (choice,) in (chunk["choices"] for chunk in chunks):
        into = folded[choice["index"]]
        into["text"] += choice["text"]
        into["finish_reason"] = choice["finish_reason"]
        for name, values in choice["logprobs"].items():
            into["logprobs"][name] = [*into["logprobs"][name], *values]
    assert folded == plain


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 3]}, "prompt"),
        ({"prompt": list("abcde")}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 9}, "best_of"),
        ({"best_of": 21, "temperature": 0}, "best_of"),
        ({"best_of": 10**30}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"n": 43, "prompt": ["a", "b", "c"]}, "n"),
        ({"suffix": "x", "prompt": []}, "suffix"),
    ],
)
def test_completions_refuse_by_the_fields_name(server: Server, fields: dict[str, Any], param: str) -> None:
    assert refusal(server, "/v1/completions", **fields)["param"] == param


def test_best_of_returns_the_n_best(server: Server) -> None:
    body = complete(server, best_of=2, n=1, max_tokens=2, temperature=1.0)
    assert len(body["choices"]) == 1
    assert body["usage"]["completion_tokens"] == 4


def test_the_best_of_equal_answers_needs_no_copies(server: Server) -> None:
    body = complete(server, best_of=20, max_tokens=2, temperature=0)
    assert (len(body["choices"]), body["usage"]["completion_tokens"]) == (1, 2)


def test_the_model_is_listed_and_found_by_its_name(server: Server) -> None:
    (model,) = httpx.get(server.url + "/v1/models").json()["data"]
    assert list(model) == ["id", "object", "created", "owned_by"]
    assert httpx.get(f"{server.url}/v1/models/{model['id']}").json() == model
    missing = httpx.get(server.url + "/v1/models/other")
    error = missing.json()["error"]
    assert (missing.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")


@pytest.mark.parametrize("method, path, allowed", [
    ("GET", "/v1", None), ("GET", "/v1/", None), ("POST", "/v1/embeddings", None), ("DELETE", "/v1/files/x", None),
    ("POST", "/v1/chat/completions/", None), ("GET", "/v1//models", None), ("GET", "/v1/" + "x" * 5000, None),
    ("GET", "/v1/chat/completions", "POST"), ("DELETE", "/v1/completions", "POST"), ("POST", "/v1/models", "GET,HEAD"),
    ("PUT", "/v1/models/x", "GET,HEAD"),
])  # fmt: skip
def test_unknown_paths_and_methods_have_openais_error(
    server: Server, method: str, path: str, allowed: str | None
) -> None:
    response = httpx.request(method, server.url + path)
    assert response.status_code == (405 if allowed else 404)
    assert response.headers.get("allow") == allowed
    error = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["type"] == "invalid_request_error"
    assert error["code"] == ("method_not_supported" if allowed else "unknown_url")
    assert path[:64] in error["message"]
    assert len(error["message"]) < 300


def test_paths_that_only_look_like_openais_answer_as_tgi(server: Server) -> None:
    for path in ("/v1x", "/v10/models", "/V1/models", "/x/v1/models"):
        assert httpx.get(server.url + path).content == b""
