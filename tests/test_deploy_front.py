"""The front of a deployment, with replicas of this file in place of Ray's; its streams go on elsewhere."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from tokenmill.deploy.broken_streams import ContinuedStream
from tokenmill.deploy.front import Front
from tokenmill.deploy.messages import Ask, Head, ReplicaInfo, ReplicaLost
from tokenmill.deploy.selection import Served
from tokenmill.server.resume import RESUME_HEADER, TOKEN_IDS_HEADER, encode_ids

JSON = [(b"Content-Type", b"application/json"), (b"X-Two", b"1"), (b"x-two", b"2")]
STREAM = [(b"content-type", b"text/event-stream")]
Answer = Callable[[Ask], Any]


class FakeReplicas:
    """Replicas whose answers are written down: for each request in turn, a list of parts; an exception is raised."""

    def __init__(self, *answers: list[Any]) -> None:
        self.answers = list(answers)
        self.asked: list[Ask] = []
        self.closed = 0

    async def send(self, ask: Ask) -> AsyncGenerator[Head | bytes, None]:
        self.asked.append(ask)
        ask.progress.replica = f"replica {len(self.asked)}"
        try:
            for part in self.answers[min(len(self.asked), len(self.answers)) - 1]:
                if isinstance(part, Exception):
                    raise part
                yield part
        finally:
            self.closed += 1

    async def info(self, ask: Ask) -> ReplicaInfo:
        self.asked.append(ask)
        return ReplicaInfo("a", "http://10.0.0.1:1234")

    async def infos(self) -> list[ReplicaInfo]:
        return [ReplicaInfo("a", "http://10.0.0.1:1234"), ReplicaInfo("b", "")]

    async def broadcast(self, ask: Ask) -> list[tuple[Head, bytes]]:
        return [(Head(name, 200, []), b"# HELP up x\n# TYPE up gauge\nup 1\n") for name in ("a", "b")]


def ask(
    models: dict[str, FakeReplicas], path: str, body: bytes = b"", method: str = "", root: str = "",
    headers: Any = (), limit: int = 1000, may_sleep: bool = False,
) -> tuple[int, list[tuple[bytes, bytes]], list[bytes]]:  # fmt: skip
    """Return status, headers and parts of the body."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    path, _, query = path.partition("?")
    scope = {
        "type": "http", "method": method or ("POST" if body else "GET"), "path": path, "raw_path": path.encode(),
        "root_path": root, "query_string": query.encode(), "headers": list(headers),
    }  # fmt: skip
    front = Front({Served(name, f"org/{name}", may_sleep): one for name, one in models.items()}, limit)  # type: ignore[misc]
    asyncio.run(front(scope, receive, send))
    assert [m["type"] for m in sent] == ["http.response.start"] + ["http.response.body"] * (len(sent) - 1)
    assert [m.get("more_body", False) for m in sent[1:]] == [True] * (len(sent) - 2) + [False]
    return sent[0]["status"], sent[0]["headers"], [m["body"] for m in sent[1:]]


def test_an_answer_passes_unchanged_except_for_the_id_that_the_proxy_adds() -> None:
    replicas = FakeReplicas([Head("a", 422, [*JSON, (b"x-request-id", b"7")]), b'{"a"', b": 1}"])
    asked = [(b"authorization", b"Bearer x"), (TOKEN_IDS_HEADER, b"1"), (RESUME_HEADER, b"AAAA")]
    status, headers, parts = ask({"m": replicas}, "/gen%20erate?a=%41", b'{"inputs": "x"}', headers=asked)
    assert (status, parts) == (422, [b'{"a": 1}'])
    assert headers == [*JSON, (b"content-length", b"8")]
    (one,) = replicas.asked
    assert (one.method, one.target, one.body) == ("POST", "/gen%20erate?a=%41", b'{"inputs": "x"}')
    assert one.headers == [(b"authorization", b"Bearer x"), (TOKEN_IDS_HEADER, b"1")]  # the client's are not passed on
    assert (one.prompt, one.exclude) == ("x", ())


def test_a_prefix_of_the_application_and_of_the_model_are_removed() -> None:
    small, large = FakeReplicas([Head("a", 200, [])]), FakeReplicas([Head("b", 200, [])])
    assert ask({"small": small, "large": large}, "/llm/large/generate", b"{}", root="/llm")[0] == 200
    assert ask({"small": small, "large": large}, "/llm/generate", b"{}", root="/llm")[0] == 200
    assert [one.target for one in (*large.asked, *small.asked)] == ["/generate", "/generate"]


@pytest.mark.parametrize("status", [429, 503])
def test_a_refusal_goes_to_the_client_only_if_no_other_replica_serves(status: int) -> None:
    refusal = [Head("a", status, [(b"retry-after", b"3")]), b"no"]
    replicas = FakeReplicas(refusal, [Head("b", 200, JSON), b"{}"])
    assert ask({"m": replicas}, "/generate", b"{}")[0] == 200
    assert [one.exclude for one in replicas.asked] == [(), ("a",)]
    assert replicas.closed == 2
    alone = FakeReplicas(refusal)
    answered, headers, parts = ask({"m": alone}, "/generate", b"{}")
    assert (answered, parts) == (status, [b"no"])
    assert (b"retry-after", b"3") in headers
    assert len(alone.asked) == 2  # the second time it came from the same replica: there is no other


def test_a_replica_that_is_lost_before_or_within_a_whole_answer_is_replaced() -> None:
    lost = ReplicaLost("gone")
    replicas = FakeReplicas([lost], [Head("a", 200, JSON), b'{"generated', lost], [Head("b", 200, JSON), b"{}"])
    assert ask({"m": replicas}, "/generate", b"{}")[2] == [b"{}"]
    assert [one.exclude for one in replicas.asked] == [(), ("replica 1",), ("replica 1", "replica 2")]


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_if_every_replica_is_lost_the_error_has_the_form_of_the_api(path: str) -> None:
    status, headers, (body,) = ask({"m": FakeReplicas([ReplicaLost("gone")])}, path, b"{}")
    assert status == 503
    assert b"retry-after" in dict(headers)
    error = json.loads(body)
    assert "lost" in (error["error"] if path == "/generate" else error["error"]["message"])


def test_a_body_is_read_only_so_far_that_a_server_refuses_it() -> None:
    replicas = FakeReplicas([Head("a", 413, JSON), b"{}"])
    assert ask({"m": replicas}, "/generate", b"x" * 5000, limit=100)[0] == 413
    assert len(replicas.asked[0].body) == 101


def test_head_has_no_body_and_probes_need_every_model() -> None:
    good, bad = FakeReplicas([Head("a", 200, []), b"ok"]), FakeReplicas([Head("b", 503, []), b"starting"])
    assert ask({"m": good}, "/health", method="HEAD") == (200, [(b"content-length", b"2")], [b""])
    assert good.asked[0].method == "GET"
    assert ask({"m": good, "n": bad}, "/health")[::2] == (503, [b"starting"])
    assert ask({"m": good, "n": good}, "/")[0] == 200
    assert ask({"m": good, "n": FakeReplicas([ReplicaLost("gone")])}, "/ping")[0] == 503


def test_a_probe_is_answered_by_a_healthy_replica_if_there_is_one() -> None:
    restarting = [Head("a", 503, []), b"restarting"]
    replicas = FakeReplicas(restarting, [ReplicaLost("gone")], [Head("c", 200, []), b""])
    assert ask({"m": replicas}, "/health")[0] == 200
    assert [len(one.exclude) for one in replicas.asked] == [0, 1, 2]
    assert ask({"m": FakeReplicas(restarting)}, "/health")[::2] == (503, [b"restarting"])


def test_a_probe_starts_no_replica_of_a_model_that_may_have_none() -> None:
    asleep = FakeReplicas([ReplicaLost("there are none")])
    assert ask({"m": asleep}, "/health", may_sleep=True)[0] == 200
    assert asleep.asked == []


def test_the_fronts_own_lists() -> None:
    listed = FakeReplicas([Head("a", 200, JSON), b'{"object": "list", "data": [{"id": "org/x"}]}'])
    both = {"m": listed, "n": listed}
    assert json.loads(ask(both, "/v1/models")[2][0])["data"] == [{"id": "m"}, {"id": "n"}]
    assert json.loads(ask(both, "/v1/models/n")[2][0]) == {"id": "n"}
    assert ask(both, "/v1/models/o")[0] == 404
    assert json.loads(ask({"m": listed}, "/v1/models")[2][0])["data"] == [{"id": "org/x"}]
    assert [one["replica"] for one in json.loads(ask(both, "/replicas")[2][0])] == ["a", "b", "a", "b"]
    secret = FakeReplicas([Head("a", 401, [(b"www-authenticate", b"Bearer")]), b""])
    assert ask({"m": secret}, "/replicas")[0] == 401
    text = ask({"m": listed}, "/metrics")[2][0].decode()
    assert text.splitlines()[2:] == ['up{deployment="m",replica="a"} 1', 'up{deployment="m",replica="b"} 1']


def test_a_client_that_asks_for_it_is_sent_to_the_replica_itself() -> None:
    replicas = FakeReplicas([Head("a", 200, JSON), b"{}"])
    direct = [(b"x-tokenmill-route", b"direct")]
    status, headers, _ = ask({"m": replicas}, "/generate?x=1", b'{"inputs": "abc"}', headers=direct)
    assert (status, dict(headers)[b"location"]) == (307, b"http://10.0.0.1:1234/generate?x=1")
    assert replicas.asked[0].prompt == "abc"


def test_an_unexpected_error_is_an_answer_too() -> None:
    status, _, (body,) = ask({"m": FakeReplicas([KeyError("x")])}, "/generate", b"{}")
    assert (status, json.loads(body)["error"]) == (500, "Request failed during generation: Server error: KeyError")


# Streams that break off


def event(token_id: int | None, text: str) -> bytes:
    mark = b"" if token_id is None else b"id: %d\n" % token_id
    return mark + b"data: " + text.encode() + b"\n\n"


EVENTS = [event(number, f'{{"token":{number}}}') for number in range(5, 15)]
PLAIN = [one.partition(b"\n")[2] for one in EVENTS]


def stream(*parts: Any, name: str = "a") -> list[Any]:
    return [Head(name, 200, STREAM), *parts]


def test_events_pass_as_they_come_without_their_marks() -> None:
    whole = b"".join(EVENTS)
    for size in (1, 7, len(whole)):
        parts = [whole[i : i + size] for i in range(0, len(whole), size)]
        sent = ask({"m": FakeReplicas(stream(*parts))}, "/generate_stream", b"{}")[2]
        assert b"".join(sent) == b"".join(PLAIN)
        assert all(part.endswith(b"\n\n") for part in sent[:-1])
    parts = ask({"m": FakeReplicas(stream(*EVENTS))}, "/generate_stream", b"{}")[2]
    assert parts == [*PLAIN, b""]  # nothing is held back


@pytest.mark.parametrize("cut", range(1, 10))
def test_a_broken_stream_goes_on_elsewhere_with_the_tokens_so_far(cut: int) -> None:
    lost = ReplicaLost("gone")
    first = [*EVENTS[:cut], EVENTS[cut][: 2 * cut], lost]
    second = [b"".join(EVENTS[: cut + 1]), lost] if cut % 2 else [lost]
    replicas = FakeReplicas(stream(*first), stream(*second), stream(*EVENTS))
    sent = ask({"m": replicas}, "/generate_stream", b'{"inputs": "x"}')[2]
    assert b"".join(sent) == b"".join(PLAIN)
    given = [dict(one.headers).get(RESUME_HEADER) for one in replicas.asked]
    assert [one.exclude for one in replicas.asked] == [(), ("a",), ("a", "a")]
    done = cut + cut % 2
    assert given == [None, encode_ids(range(5, 5 + cut)), encode_ids(range(5, 5 + done))]


@pytest.mark.parametrize("path,end", [("/generate_stream", b""), ("/v1/completions", b"data: [DONE]\n\n")])
def test_a_stream_that_cannot_go_on_ends_with_an_error_in_the_form_of_the_api(path: str, end: bytes) -> None:
    lost = ReplicaLost("gone")
    for replicas in (
        FakeReplicas(stream(event(None, "{}"), lost), stream(*EVENTS)),  # without marks
        FakeReplicas(stream(EVENTS[0], lost), [Head("b", 422, JSON), b"{}"]),  # refused: several choices
        FakeReplicas(stream(EVENTS[0], lost)),  # every further one is lost, too
    ):
        sent = b"".join(ask({"m": replicas}, path, b"{}")[2])
        _, error, tail = sent.partition(b'data: {"error"')
        assert error
        assert tail.endswith(b"}\n\n" + end)


def test_the_router_learns_of_the_first_token_and_of_their_number() -> None:
    started: list[int] = []

    class Watched(FakeReplicas):
        async def send(self, ask: Ask) -> AsyncGenerator[Head | bytes, None]:
            ask.progress.on_start = lambda: started.append(ask.progress.num_new)
            async for part in super().send(ask):
                yield part

    replicas = Watched(stream(*EVENTS))
    ask({"m": replicas}, "/generate_stream", b"{}")
    assert (started, replicas.asked[0].progress.num_new) == ([1], 10)
    whole = Watched([Head("a", 200, [*JSON, (b"X-Generated-Tokens", b"7")]), b"{}"])
    ask({"m": whole}, "/generate", b"{}")
    assert (started, whole.asked[0].progress.num_new) == ([1, 7], 7)


def test_a_stream_of_several_replicas_has_one_id_and_one_time() -> None:
    def chunk(name: str, created: int, text: str) -> str:
        return f'{{"id":"{name}","object":"o","created":{created},"choices":[{{"text":"{text}"}}]}}'

    one = ContinuedStream()
    before = one.feed(event(1, chunk("cmpl-a", 10, "x")))
    one.restart()
    after = one.feed(event(1, chunk("cmpl-b", 20, "x")) + event(2, chunk("cmpl-b", 20, '\\"id\\":\\"cmpl-b\\"')))
    assert before == event(None, chunk("cmpl-a", 10, "x"))
    assert after == event(None, chunk("cmpl-a", 10, '\\"id\\":\\"cmpl-b\\"'))


def test_comments_pass_and_a_complete_stream_is_not_continued() -> None:
    one = ContinuedStream()
    assert one.feed(b":\n\n") == b":\n\n"
    assert one.resumable
    one.feed(EVENTS[0] + b"data: {}\n\ndata: [DONE]\n\n")  # the usage has no token
    assert one.over
    done = stream(EVENTS[0], event(None, "{}"), event(None, "[DONE]"), ReplicaLost("gone"))
    replicas = FakeReplicas(done)
    assert b"".join(ask({"m": replicas}, "/v1/completions", b"{}")[2]) == PLAIN[0] + b"data: {}\n\ndata: [DONE]\n\n"
    assert len(replicas.asked) == 1
