"""Measure the delay of a running stream while the server reads another client's large or hostile body.

    python bench/hostile.py [--size 1000000] [--only schema] [--serve "--model-id …"] [--url http://…]

Each body in turn is sent while a stream runs. The table shows the answer's status, its duration, and the longest gap
between two events of the stream in that time. The first line, of a small request, is the baseline of the machine.
Without `--url`, a server with the mock engine is started, whose steps take 5 ms.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import socket
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

from serving import served

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
HI = [{"role": "user", "content": "hi"}]
UNITS = {
    "letters": "hello world ", "digits": "1234567890", "brackets": "[{(<", "spaces": " ", "one letter": "a",
    "escapes": "\n\t\"\\\x01", "emoji": "👩‍👩‍👧‍👦", "tokens": "<|im_start|>", "think marks": "<think>",
    "surrogates": "\ud800",
}  # fmt: skip
"""Units that texts are repeated from"""


def chat(**fields: Any) -> tuple[str, bytes]:
    return CHAT, json.dumps({"messages": HI, "max_tokens": 4} | fields).encode()


def completion(**fields: Any) -> tuple[str, bytes]:
    return COMPLETIONS, json.dumps({"prompt": "hi", "max_tokens": 4} | fields).encode()


def shaped(schema: Any) -> tuple[str, bytes]:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})


def nested(depth: int, size: int) -> Any:
    """Return a schema of nesting depth `depth`, padded to `size`."""
    schema: Any = {"type": "string", "description": "x" * max(size - depth * 60, 0)}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def properties(size: int, one: Any) -> Any:
    names = [f"field_{i}" for i in range(size // (len(json.dumps(one)) + 16))]
    return {"type": "object", "properties": dict.fromkeys(names, one), "required": names[:100]}


def tools(count: int, size: int) -> list[Any]:
    parameters = properties(size // count, {"type": "string"})
    return [{"type": "function", "function": {"name": f"f{i}", "parameters": parameters}} for i in range(count)]


def filled(unit: str, size: int) -> str:
    return unit * (size // (len(json.dumps(unit)) - 2))


def raw(path: str, field: str, unit: str, size: int, around: str = "[]") -> tuple[str, bytes]:
    """Return path and body of a request whose `field` is JSON text of one repeated unit."""
    inner = ",".join([unit] * (size // (len(unit) + 1)))
    given = {"messages": HI} if path == CHAT else {"prompt": "hi"} if path == COMPLETIONS else {"inputs": "hi"}
    given.pop(field, None)
    head = json.dumps(given)[:-1] + ("," if given else "")
    return path, f'{head}"{field}":{around[0]}{inner}{around[1]}}}'.encode()


def bodies(size: int) -> Iterator[tuple[str, Callable[[], tuple[str, bytes]]]]:
    """Yield the name of each request, and a function that makes its path and body."""
    text = {"type": "string"}
    yield "a small request", lambda: chat()
    yield "schema: many properties", lambda: shaped(properties(size, text))
    yield "schema: many patterns", lambda: shaped(properties(size, {"type": "string", "pattern": "^(a+)+b$"}))
    yield "schema: one long description", lambda: shaped({"type": "object", "description": "x" * size})
    yield "schema: a large enum", lambda: shaped({"enum": [f"value {i}" for i in range(size // 16)]})
    yield "schema: 90 deep", lambda: shaped(nested(90, size))
    yield "schema: 300 deep", lambda: shaped(nested(300, size))
    yield "schema: 800 deep", lambda: shaped(nested(800, size))
    yield "schema as text", lambda: shaped(json.dumps(properties(size, text)))
    yield "schema of /generate", lambda: (GENERATE, json.dumps({"inputs": "hi", "parameters": {
        "grammar": {"type": "json", "value": properties(size, text)}}}).encode())  # fmt: skip
    yield "regex: long", lambda: chat(response_format={"type": "regex", "value": filled("(a+)+", size)})
    yield "regex: catastrophic", lambda: chat(response_format={"type": "regex", "value": "(a+)+" * 20 + "{1000}$"})
    yield "regex: many brackets", lambda: chat(guided_regex="(" * (size // 2) + ")" * (size // 2))
    yield "lark grammar", lambda: chat(guided_grammar="start: " + filled('"a" | ', size))
    yield "guided_choice", lambda: chat(guided_choice=[f"value {i}" for i in range(size // 16)])
    for name, unit in UNITS.items():
        yield f"prompt: {name}", partial(completion, prompt=filled(unit, size))
        yield f"chat: {name}", partial(chat, messages=[{"role": "user", "content": filled(unit, size)}])
    yield "chat: many messages", lambda: chat(messages=[
        {"role": ("user", "assistant")[i % 2], "content": "x" * 60} for i in range(size // 100)] + HI)  # fmt: skip
    yield "chat: many empty messages", lambda: raw(CHAT, "messages", '{"role":"user","content":""}', size)
    yield "chat: many parts", lambda: chat(messages=[
        {"role": "user", "content": [{"type": "text", "text": "x"}] * (size // 32)}])  # fmt: skip
    yield "chat: many calls", lambda: chat(messages=[*HI, {"role": "assistant", "tool_calls": [
        {"type": "function", "id": "a", "function": {"name": "f", "arguments": "{}"}}] * (size // 90)}])  # fmt: skip
    yield "chat: roles unknown at the end", lambda: chat(messages=HI * (size // 40) + [{"role": "x"}])
    yield "prompt: token ids", lambda: raw(COMPLETIONS, "prompt", "1", size)
    yield "prompt: lists of ids", lambda: raw(COMPLETIONS, "prompt", "[1]", size)
    yield "prompt: many texts", lambda: raw(COMPLETIONS, "prompt", '"a"', size)
    yield "prompt: empty lists", lambda: raw(COMPLETIONS, "prompt", "[]", size)
    yield "prompt: one long number", lambda: raw(COMPLETIONS, "prompt", "1" * (size - 50), size - 40)
    yield "seed: one long number", lambda: raw(CHAT, "seed", "1" * (size - 50), size - 40, "  ")
    yield "temperature: long fraction", lambda: raw(CHAT, "temperature", "0." + "1" * (size - 50), size - 40, "  ")
    yield "stop: many", lambda: raw(CHAT, "stop", '"a"', size)
    yield "stop: one long", lambda: chat(stop=["a" * size])
    yield "logit_bias", lambda: chat(logit_bias={str(i): 1 for i in range(size // 11)})
    yield "logit_bias: bad at its end", lambda: chat(logit_bias={str(i): 1 for i in range(size // 11)} | {"x": 1})
    yield "metadata", lambda: chat(metadata={str(i): "1" for i in range(size // 13)})
    yield "tools: 128", lambda: chat(tools=tools(128, size))
    yield "tools: 128, required", lambda: chat(tools=tools(128, size), tool_choice="required")
    yield "tools: 1, required", lambda: chat(tools=tools(1, size), tool_choice="required")
    yield "tools: too many", lambda: chat(tools=tools(size // 100, size))
    yield "template variables", lambda: chat(chat_template_kwargs={str(i): [] for i in range(size // 12)})
    yield "template variables: lists", lambda: chat(chat_template_kwargs={"x": [[]] * (size // 4)})
    yield "documents", lambda: chat(documents=[{"title": "a", "text": "b"}] * (size // 32))
    yield "unknown field", lambda: raw(CHAT, "unknown", "[]", size)
    yield "wrong type at the end", lambda: (CHAT, raw(CHAT, "stop", '"a"', size)[1][:-2] + b",1]}")
    yield "wrong type beside", lambda: (CHAT, b'{"messages":[],"x":[' + b"[]," * (size // 3) + b'[]],"seed":"x"}')
    yield "no JSON: brackets", lambda: (CHAT, b"[" * size)
    yield "no JSON: cut off", lambda: (CHAT, raw(CHAT, "documents", "{}", size)[1][:-3])
    yield "no JSON: lines", lambda: (CHAT, b"\n" * size + b"x")
    yield "no UTF-8", lambda: (CHAT, b'{"messages":"' + b"\xff" * size)
    yield "/tokenize", lambda: ("/tokenize", json.dumps({"inputs": filled("a 1", size)}).encode())
    yield "/chat_tokenize", lambda: ("/chat_tokenize", json.dumps(
        {"messages": [{"role": "user", "content": filled("a 1", size)}]}).encode())  # fmt: skip
    yield "/vertex", lambda: ("/vertex", b'{"instances":[' + b'{"inputs":"a"},' * (size // 15) + b"{}]}")
    yield "/vertex: one chat", lambda: ("/vertex", json.dumps({"instances": [{"messages": [
        {"role": "user", "content": "x"}] * (size // 34)}]}).encode())  # fmt: skip
    yield "/v2 infer", lambda: ("/v2/models/m/infer", b'{"inputs":[{"name":"a","shape":[1],"datatype":"BYTES","data":['
                                + b"97," * (size // 3) + b'97]}],"outputs":[{"name":"b"}]}')  # fmt: skip
    yield "/invocations", lambda: ("/invocations", raw(CHAT, "documents", "{}", size)[1])


class Stream:
    """Stream that runs until it is closed, and records the times of its events."""

    def __init__(self, host: str, port: int, tokens: int) -> None:
        body = json.dumps({"inputs": "hi", "parameters": {"max_new_tokens": tokens, "ignore_eos": True}}).encode()
        head = "POST /generate_stream HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        self._sock = socket.create_connection((host, port))
        self._sock.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.times: list[float] = []
        self.broken = ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._sock.recv(1 << 16):
                if data.count(b"data:"):
                    self.times.append(time.perf_counter())
                if b'"error"' in data or data.endswith(b"0\r\n\r\n"):
                    self.broken = data.decode(errors="replace")[-200:]

    def longest_gap(self, begin: float, end: float) -> float:
        """Return the longest gap in milliseconds, of gaps that overlap the time from `begin` to `end`."""
        times = [*self.times, time.perf_counter()]
        gaps = [(b - a) for a, b in pairwise(times) if b >= begin and a <= end]
        return 1000 * max(gaps, default=0.0)

    def close(self) -> None:
        self._sock.close()


def post(host: str, port: int, path: str, body: bytes) -> tuple[int, str]:
    """Send a request; return the status and the beginning of the answer."""
    connection = http.client.HTTPConnection(host, port, timeout=120)
    connection.request("POST", path, body, {"content-type": "application/json"})
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, text[:150].decode(errors="replace")


def main() -> None:
    """Send every body and print the table."""
    sys.setrecursionlimit(10_000)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server; else one is started")
    parser.add_argument("--serve", default="--mock --mock-step-ms 5", help="options of the server that is started")
    parser.add_argument("--size", type=int, default=1_000_000, help="bytes of a body, about")
    parser.add_argument("--only", default="", help="bodies whose name contains this")
    parser.add_argument("--tokens", type=int, default=4000, help="of the stream; the context must hold them")
    parser.add_argument("--repeat", type=int, default=1, help="each body so often; the longest gap is shown")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        url = urllib.parse.urlsplit(options.url or stack.enter_context(served(*options.serve.split())))
        host, port = url.hostname or "127.0.0.1", url.port or 80
        for name, make in bodies(options.size):
            if options.only not in name:
                continue
            path, body = make()
            gaps, took, status, text = [], [], 0, ""
            for _ in range(options.repeat):
                stream = Stream(host, port, options.tokens)
                time.sleep(0.4)
                begin = time.perf_counter()
                status, text = post(host, port, path, body)
                end = time.perf_counter()
                time.sleep(0.1)
                if stream.broken:
                    text = f"THE STREAM ENDED: {stream.broken}"
                gaps.append(stream.longest_gap(begin, end))
                took.append(end - begin)
                stream.close()
            print(f"{name:32}{len(body):10,} B  {status}  {max(took):7.2f} s  gap {max(gaps):7.1f} ms  {text[:110]}",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
