"""Arrival of requests: slow, in pieces, concurrent, with offers of other protocols. Tests uvicorn itself."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
import uvloop

from tokenmill.server import protocol
from tokenmill.server.protocol import BoundedProtocol

BIG = 30_000_000


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the path and the body."""
    if scope["path"] == "/no":  # answers before the body is read
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})
        return
    if scope["path"] == "/headers":
        answer = repr(sorted(scope["headers"])).encode()
        length = (b"content-length", b"%d" % len(answer))
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": answer})
        return
    if scope["path"] == "/big":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % BIG)]})
        await send({"type": "http.response.body", "body": bytes(BIG)})
        return
    if scope["path"] == "/stream":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in (b"one,", b"", b"two,", b"three."):
            await send({"type": "http.response.body", "body": part, "more_body": part != b"three."})
        return
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message.get("body", b"")
        more = message.get("more_body", False)
    if scope["path"] == "/slow":
        await asyncio.sleep(0.7)
    answer = scope["path"].encode() + b" " + body
    length = (b"content-length", b"%d" % len(answer))
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": answer})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.4)
    monkeypatch.setattr(protocol, "BODY_TIMEOUT_S", 0.4)
    monkeypatch.setattr(protocol, "IDLE_TIMEOUT_S", 0.8)
    monkeypatch.setattr(protocol, "MIN_BODY_RATE", 1000)
    monkeypatch.setattr(protocol, "DRAIN_TIMEOUT_S", 0.3)
    config = uvicorn.Config(echo, http=BoundedProtocol, ws="none", lifespan="off", log_config=None, server_header=False)
    server = uvicorn.Server(config)
    sock = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: uvloop.run(server.serve([sock])))
    thread.start()
    yield sock.getsockname()[1]
    server.should_exit = True
    thread.join(10)


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def rest(sock: socket.socket) -> bytes:
    """Return everything until the server closes."""
    answer = b""
    try:
        while part := sock.recv(65536):
            answer += part
    except ConnectionResetError:
        pass
    return answer


def answered(sock: socket.socket, count: int) -> bytes:
    """Return everything until `count` answers are complete."""
    answer = b""
    while answer.count(b"HTTP/1.1 200") < count or not answer.endswith(b"."):
        part = sock.recv(65536)
        assert part, answer
        answer += part
    return answer


POST = b"POST /a HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\nabc."


def test_a_head_that_trickles_in_is_given_up(port: int) -> None:
    begin = time.monotonic()
    with connect(port) as sock:
        for letter in b"GET / HTTP/1.1\r\nhost: abcdefghijklmnopqrstuvwxyz":
            try:
                sock.sendall(bytes([letter]))
            except OSError:
                break
            time.sleep(0.02)
        assert rest(sock).startswith(b"HTTP/1.1 408 ")
    assert 0.3 < time.monotonic() - begin < 15


@pytest.mark.parametrize("path, key", [(b"/generate", b'{"error":"'), (b"/v1/completions", b'{"error":{')])
def test_a_body_that_stops_is_given_up_in_the_dialect_of_its_route(port: int, path: bytes, key: bytes) -> None:
    with connect(port) as sock:
        sock.sendall(b"POST " + path + b" HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\nabc")
        answer = rest(sock)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in answer
    assert answer.partition(b"\r\n\r\n")[2].startswith(key)


def test_a_long_body_that_keeps_coming_has_longer(port: int) -> None:
    with connect(port) as sock:
        sock.sendall(b"POST /a HTTP/1.1\r\nhost: x\r\ncontent-length: 2001\r\n\r\n")
        for _ in range(10):
            sock.sendall(b"x" * 200)
            time.sleep(0.1)
        sock.sendall(b".")
        assert answered(sock, 1).endswith(b"x.")


def test_a_connection_that_says_nothing_is_closed_without_a_word(port: int) -> None:
    begin = time.monotonic()
    with connect(port) as sock:
        assert rest(sock) == b""
    assert 0.6 < time.monotonic() - begin < 15


def test_a_kept_connection_may_rest_longer_than_a_head_may_take(port: int) -> None:
    with connect(port) as sock:
        for _ in range(3):
            sock.sendall(POST)
            answered(sock, 1)
            time.sleep(0.6)
        sock.sendall(b"GET")  # the deadline of the next head begins
        assert rest(sock).startswith(b"HTTP/1.1 408 ")


def test_a_slow_handler_is_no_slow_client(port: int) -> None:
    with connect(port) as sock:
        sock.sendall(POST)
        answered(sock, 1)
        time.sleep(1)
        sock.sendall(POST)
        assert answered(sock, 1).endswith(b"abc.")


@pytest.mark.parametrize("cut", [1, 10, len(POST) - 5, len(POST) - 1])
def test_pieces_and_pipelines_are_read_as_one(port: int, cut: int) -> None:
    with connect(port) as sock:
        sock.sendall(POST[:cut])
        time.sleep(0.05)
        sock.sendall(POST[cut:] + POST + POST)
        assert answered(sock, 3).count(b"/a abc.") == 3


def test_an_offer_to_speak_another_protocol_is_ignored_body_and_all(port: int) -> None:
    offer = b"connection: Upgrade, HTTP2-Settings\r\nUpgrade : h2c\r\nhttp2-settings: AAMAAABk\r\n"
    for line in (offer.replace(b" :", b":"), offer.replace(b"Upgrade :", b"upgrade:")):
        with connect(port) as sock:
            sock.sendall(POST.replace(b"content-length", line + b"content-length"))
            assert answered(sock, 1).endswith(b"/a abc.")
            sock.sendall(POST)
            assert answered(sock, 1).endswith(b"/a abc.")


def test_a_body_is_never_read_as_a_request(port: int) -> None:
    hidden = b"GET /hidden HTTP/1.1\r\nhost: x\r\nUpgrade: h2c\r\nconnection: upgrade\r\n\r\n"
    head = b"POST /a HTTP/1.1\r\nhost: x\r\nconnection: Upg" + b"rade\r\nUpgrade: h2c\r\ncontent-length: %d\r\n\r\n"
    whole = head % (len(hidden) + 1) + hidden + b"."
    for cut in range(1, len(whole), 7):
        with connect(port) as sock:
            sock.sendall(whole[:cut])
            time.sleep(0.01)
            sock.sendall(whole[cut:])
            sock.shutdown(socket.SHUT_WR)
            answer = sock.recv(65536)
        assert b"\r\n\r\n/hidden" not in answer


@pytest.mark.parametrize("ending", [b"", b"connection: close\r\n"])
def test_a_connection_that_does_not_read_its_answer_is_closed(port: int, ending: bytes) -> None:
    with connect(port) as sock:
        sock.sendall(b"GET /big HTTP/1.1\r\nhost: x\r\n" + ending + b"\r\n")
        time.sleep(1)
        assert len(rest(sock)) < BIG
    with connect(port) as sock:
        sock.sendall(b"GET /big HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        size = 0
        while part := sock.recv(2_000_000):  # reads slowly, but steadily
            size += len(part)
            time.sleep(0.05)
        assert size > BIG


def test_http_1_0_gets_no_chunks(port: int) -> None:
    with connect(port) as sock:
        sock.sendall(b"GET /stream HTTP/1.0\r\n\r\n")
        head, _, body = rest(sock).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    assert body == b"one,two,three."
    with connect(port) as sock:
        sock.sendall(POST.replace(b"1.1", b"1.0"))
        assert rest(sock).endswith(b"\r\n\r\n/a abc.")
    with connect(port) as sock:
        sock.sendall(b"GET /stream HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert rest(sock).endswith(b"\r\n\r\n4\r\none,\r\n4\r\ntwo,\r\n6\r\nthree.\r\n0\r\n\r\n")


def test_a_refused_request_is_answered_once_however_slowly_its_body_comes(port: int) -> None:
    with connect(port) as sock:
        sock.sendall(b"POST /no HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\nabc")
        answer = rest(sock)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert answer.startswith(b"HTTP/1.1 401 ")


def test_a_second_request_that_stalls_does_not_answer_for_the_first(port: int) -> None:
    slow = POST.replace(b"POST /a", b"POST /slow")
    with connect(port) as sock:
        sock.sendall(slow + POST[:-2])
        answer = rest(sock)
    assert b" 408 " not in answer or answer.index(b" 200 ") < answer.index(b" 408 ")


def test_what_follows_a_request_and_is_none_never_answers_for_it(port: int) -> None:
    with connect(port) as sock:
        sock.sendall(POST + b"\x00garbage\r\n\r\n")
        answer = rest(sock)
    assert b" 400 " not in answer or b" 200 " in answer


def answer_to(port: int, request: bytes) -> bytes:
    with connect(port) as sock:
        sock.sendall(request)
        return rest(sock)


@pytest.mark.parametrize("before", [b"", b" ", b"\t", b" \t "])
@pytest.mark.parametrize("behind", [b"", b" ", b"\t", b"  \t"])
def test_white_space_around_a_headers_value_is_no_part_of_it(port: int, before: bytes, behind: bytes) -> None:
    lines = b"".join(b"%s:%s%s%s\r\n" % (name, before, value, behind) for name, value in (
        (b"host", b"x"), (b"Authorization", b"Bearer  a b"), (b"x-empty", b""), (b"connection", b"close")
    ))  # fmt: skip
    _, _, body = answer_to(port, b"GET /headers HTTP/1.1\r\n" + lines + b"\r\n").partition(b"\r\n\r\n")
    assert eval(body) == [
        (b"authorization", b"Bearer  a b"), (b"connection", b"close"), (b"host", b"x"), (b"x-empty", b"")
    ]  # fmt: skip


@pytest.mark.parametrize("line", [b"expect: 100-continue", b"expect:100-Continue", b"Expect: \t100-continue \t"])
def test_a_client_that_waits_to_be_asked_for_its_body_is_asked(port: int, line: bytes) -> None:
    with connect(port) as sock:
        sock.sendall(b"POST /a HTTP/1.1\r\nhost: x\r\ncontent-length: 4 \r\n" + line + b"\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 100 ")
        sock.sendall(b"abc.")
        assert answered(sock, 1).endswith(b"/a abc.")


@pytest.mark.parametrize("head, why", [
    (b"GET /a HTTP/1.1\r\n", b"one Host header. Given: none"),
    (b"GET /a HTTP/1.1\r\nhost: x\r\nHOST: x\r\n", b"one Host header. Given: 2"),
    (b"GET /a HTTP/1.0\r\nhost: x\r\nhost: y\r\n", b"one Host header. Given: 2"),
    (b"GET http://x/a HTTP/1.1\r\n", b"one Host header"),
    (b"GET /a HTTP/1.1\r\nhost: a b\r\n", b"The Host header must be"),
    (b"GET /a HTTP/1.1\r\nhost: http://a/\r\n", b"The Host header must be"),
    (b"GET /a HTTP/1.1\r\nhost: u@a\r\n", b"The Host header must be"),
    (b"GET /a\r\n", b"HTTP/0.9 is not supported"),
    (b"GET /a HTTP/0.9\r\nhost: x\r\n", b"HTTP/0.9 is not supported"),
    (b"GET /a HTTP/2.0\r\nhost: x\r\n", b"HTTP/2.0 is not supported"),
    (b"GET /a HTTP/1.2\r\nhost: x\r\n", b""),
    (b"GET a HTTP/1.1\r\nhost: x\r\n", b""),
    (b"CONNECT x:443 HTTP/1.1\r\nhost: x\r\n", b"target must be a path"),
    (b"POST /a HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip, chunked\r\n", b"The only Transfer-Encoding"),
    (b"POST /a HTTP/1.0\r\nhost: x\r\ntransfer-encoding: chunked\r\n", b"HTTP/1.0 has no Transfer-Encoding"),
])  # fmt: skip
def test_a_head_that_http_forbids_is_refused_with_the_reason(port: int, head: bytes, why: bytes) -> None:
    answer = answer_to(port, head + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1") == 1
    assert b"connection: close" in answer
    assert why in answer


@pytest.mark.parametrize("target", [b"/v1/chat/completions", b"http://x/v1/chat/completions", b"/v1"])
def test_a_head_is_refused_in_the_dialect_of_its_path(port: int, target: bytes) -> None:
    body = answer_to(port, b"GET " + target + b" HTTP/1.1\r\n\r\n").partition(b"\r\n\r\n")[2]
    assert body.startswith(b'{"error":{"message":"')


@pytest.mark.parametrize("target, path", [
    (b"http://x/a", b"/a"), (b"HTTP://x:80/a?b=c", b"/a"), (b"https://[::1]:3/a/b", b"/a/b"), (b"http://x", b"/"),
    (b"http://x?b=c", b"/"), (b"/a?http://x/b", b"/a"), (b"//x/a", b"//x/a"), (b"/%61", b"/a"), (b"*", b"*"),
])  # fmt: skip
def test_every_form_of_a_target_leads_to_its_path(port: int, target: bytes, path: bytes) -> None:
    answer = answer_to(port, b"GET " + target + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert answer.endswith(b"\r\n\r\n" + path + b" ")


@pytest.mark.parametrize("host", [b"", b"x", b"X.example:3000", b"[::1]:80", b"my_service", b"10.0.0.1", b"%41"])
def test_hosts_of_every_kind_are_served(port: int, host: bytes) -> None:
    answer = answer_to(port, b"GET /a HTTP/1.1\r\nhost: " + host + b"\r\nconnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
