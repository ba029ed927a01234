"""The front of a deployment: an ASGI application that answers as one server does, from the replicas of its models.

A request goes to a replica and its answer comes back unchanged. A replica that refuses or is lost is replaced by
another, also in the middle of a stream. The front's own answers: `/replicas`, and those that need every model
(`/health`, `/v1/models`) or every replica (`/metrics`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.types import Message, Receive, Scope, Send

from tokenmill.deploy import merged
from tokenmill.deploy.broken_streams import ContinuedStream
from tokenmill.deploy.messages import Ask, Head, Headers, Progress, ReplicaLost, Replicas
from tokenmill.deploy.prompts import prompt_and_limit
from tokenmill.deploy.selection import Served, select
from tokenmill.errors import GenerationError, NotReady, RequestError
from tokenmill.server import failures, sse
from tokenmill.server.app import InternalError, lifespan
from tokenmill.server.resume import RESUME_HEADER, TOKEN_IDS_HEADER

DIRECT_HEADER = b"x-tokenmill-route"
"""Request header: with the value `direct`, the answer is a redirection to the server of the chosen replica."""
_ATTEMPTS = 4
_PROBE_S = 5.0
_TIMES = 4096
_PROBES = ("/", "/health", "/ping", "/v2/health/live", "/v2/health/ready")
_MODELS = "/v1/models/"
_ELSEWHERE = (429, 503)  # refusals that another replica may not share
_LOST = "the replica that served this request was lost"

log = logging.getLogger(__name__)


class Front:
    """The application. `models`: the first one is for requests that name none; `payload_limit`: bytes of a body that
    servers accept; `routing_times`: what the last choices of a replica took, in seconds of wall time and of CPU time;
    `num_continued`: streams that have gone on at another replica."""

    def __init__(self, models: Mapping[Served, Replicas], payload_limit: int) -> None:
        self._models, self._served = models, tuple(models)
        self._payload_limit = payload_limit
        self.routing_times: deque[tuple[float, float]] = deque(maxlen=_TIMES)
        self.num_continued = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. See ASGI."""
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
        elif scope["type"] == "http":
            body = await _body(receive, self._payload_limit)
            if body is not None:
                exchange = _Exchange(self._models, self._served, scope, body, send)
                await exchange.run()
                self.num_continued += exchange.continued
                if exchange.routing_s is not None:
                    self.routing_times.append(exchange.routing_s)


class _Exchange:
    """One request and its answer. `continued`: it is a stream that has gone on at another replica."""

    def __init__(
        self, models: Mapping[Served, Replicas], served: tuple[Served, ...], scope: Scope, body: bytes, send: Send
    ) -> None:
        self._models, self._served, self._send = models, served, send
        self.method: str = scope["method"]
        self.path = _path_of(scope)
        self._query: bytes = scope.get("query_string", b"")
        self._headers: Headers = [(n, v) for n, v in scope["headers"] if n != RESUME_HEADER and n != TOKEN_IDS_HEADER]
        self._body = body
        self._dialect = failures.dialect_of(self.path)
        self._started = False
        self.continued = False
        self.routing_s: tuple[float, float] | None = None

    async def run(self) -> None:
        """Send the answer."""
        try:
            served, path = select(self._served, self.path, self._body)
            special = self._special(path) if path == self.path else None
            if special is not None:
                await special()
            else:
                await self._forward(self._models[served], self._ask(path))
        except RequestError as error:
            await self._fail(error)
        except Exception as error:
            if self._started:
                raise
            log.exception("%s %s failed", self.method, self.path)
            await self._fail(InternalError(f"Server error: {type(error).__name__}"))

    def _special(self, path: str) -> Callable[[], Awaitable[None]] | None:
        if self.method not in ("GET", "HEAD"):
            return None
        if path in _PROBES:
            return self._probe
        if (path == "/v1/models" or path.startswith(_MODELS)) and len(self._served) > 1:
            return self._list_models
        return {"/metrics": self._metrics, "/replicas": self._list_replicas}.get(path)

    def _ask(self, path: str) -> Ask:
        query = f"?{self._query.decode('latin-1')}" if self._query else ""
        begun, cpu = time.perf_counter(), time.thread_time()
        prompt, limit = prompt_and_limit(self._body) if self.method == "POST" else ("", 0)
        self._reading_s = time.perf_counter() - begun, time.thread_time() - cpu
        return Ask(
            method=self.method, target=path + query, headers=self._headers, body=self._body,
            prompt=prompt, max_new_tokens=limit,
        )  # fmt: skip

    # Answers of one replica

    async def _forward(self, replicas: Replicas, ask: Ask) -> None:
        """Send the answer of a replica, of another one if it refuses or is lost."""
        if self.method == "POST":
            if any(name == DIRECT_HEADER and value == b"direct" for name, value in ask.headers):
                info = await _unless_lost(replicas.info(ask))
                if info.address:
                    await self._reply(307, b"", [(b"location", (info.address + ask.target).encode())])
                    return
            ask = msgspec.structs.replace(ask, headers=[*ask.headers, (TOKEN_IDS_HEADER, b"1")])
        tried: list[str] = []
        for attempt in range(_ATTEMPTS):
            last = attempt == _ATTEMPTS - 1
            try:
                async with aclosing(replicas.send(msgspec.structs.replace(ask, exclude=tuple(tried)))) as answer:
                    head = await _head(answer)
                    if self.method == "POST":
                        wall, cpu = ask.progress.routing_s
                        self.routing_s = wall + self._reading_s[0], cpu + self._reading_s[1]
                    if head.status in _ELSEWHERE and not last and head.replica not in tried:
                        tried.append(head.replica)
                        continue
                    if not _is_stream(head):
                        body = await _rest(answer)
                        ask.progress.advance(_num_generated(head))
                        await self._reply(head.status, body, _own(head.headers))
                        return
                    await self._start(head.status, _own(head.headers))
                    stream = ContinuedStream()
                    lost = await self._pass_on(answer, stream, ask.progress)
            except ReplicaLost as error:
                log.warning("A replica was lost before its answer: %s", error)
                tried.append(ask.progress.replica)
                continue
            if lost:
                await self._continue(replicas, ask, stream, [head.replica])
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        raise NotReady(_LOST)

    async def _pass_on(
        self, answer: AsyncGenerator[Head | bytes, None], stream: ContinuedStream, progress: Progress
    ) -> bool:
        """Send the events of a replica; True if it was lost before the last one."""
        try:
            async for part in answer:
                if isinstance(part, bytes) and (events := stream.feed(part)):
                    progress.advance(len(stream.ids))
                    await self._send({"type": "http.response.body", "body": events, "more_body": True})
        except ReplicaLost as error:
            log.warning("A replica was lost after %d tokens of a stream: %s", len(stream.ids), error)
            return not stream.over
        return False

    async def _continue(self, replicas: Replicas, ask: Ask, stream: ContinuedStream, tried: list[str]) -> None:
        """Send the rest of a stream from another replica, or an event with the error that ends it.

        `tried`: replicas that were lost. Serve may not know it yet, and they hold the prompt, so they would be chosen.
        """
        for _ in range(_ATTEMPTS):
            if not stream.resumable:
                break
            stream.restart()
            headers = [*ask.headers, (RESUME_HEADER, stream.resume_header())] if stream.ids else ask.headers
            again = msgspec.structs.replace(ask, headers=headers, exclude=tuple(tried))
            try:
                async with aclosing(replicas.send(again)) as answer:
                    head = await _head(answer)
                    if head.status not in (200, *_ELSEWHERE):  # this request cannot be resumed
                        break
                    self.continued = _is_stream(head)
                    if self.continued and not await self._pass_on(answer, stream, ask.progress):
                        return
                    tried.append(head.replica)
            except ReplicaLost:
                tried.append(ask.progress.replica)
        error = failures.body(GenerationError(f"Server error: {_LOST}"), self._dialect)
        end = sse.DONE if self._dialect == "openai" else b""
        await self._send({"type": "http.response.body", "body": sse.event(error) + end, "more_body": True})

    # Answers of the front

    async def _probe(self) -> None:
        """Answer as the first model that is not healthy does; if all are, as the first model.

        Models that may have no replicas are not asked, because the question would start one.
        """
        asked = [replicas for served, replicas in self._models.items() if not served.may_sleep]
        answers = [await self._fetch(replicas, self.path) for replicas in asked]
        healthy = Head("", 200, []), b""
        head, body = next((one for one in answers if one[0].status != 200), answers[0] if answers else healthy)
        await self._reply(head.status, body, _own(head.headers))

    async def _list_models(self) -> None:
        """Answer with all models, or with the one that the path names."""
        answers = [await self._fetch(replicas, "/v1/models") for replicas in self._models.values()]
        bad = next((answer for answer in answers if answer[0].status != 200), None)
        if bad is not None:
            await self._reply(bad[0].status, bad[1], _own(bad[0].headers))
            return
        named = [(served.name, body) for served, (_, body) in zip(self._served, answers, strict=True)]
        name = self.path.removeprefix(_MODELS) if self.path.startswith(_MODELS) else None
        body = merged.models(named) if name is None else merged.model(named, name)
        await self._reply(200, body, [(b"content-type", b"application/json")])

    async def _metrics(self) -> None:
        samples = []
        for served, replicas in self._models.items():
            for head, body in await _unless_lost(replicas.broadcast(self._ask("/metrics"))):
                if head.status != 200:  # it needs a key
                    await self._reply(head.status, body, _own(head.headers))
                    return
                samples.append(({"deployment": served.name, "replica": head.replica}, body.decode()))
        text = merged.metrics(samples).encode()
        await self._reply(200, text, [(b"content-type", b"text/plain; charset=utf-8")])

    async def _list_replicas(self) -> None:
        """Answer with all running replicas, to clients that may call the models."""
        first = next(iter(self._models.values()))
        head, body = await self._fetch(first, "/v1/models")
        if head.status == 401:
            await self._reply(head.status, body, _own(head.headers))
            return
        found: list[dict[str, str]] = []
        for served, replicas in self._models.items():
            for info in await _unless_lost(replicas.infos()):
                found.append({"model": served.name, **msgspec.structs.asdict(info)})
        await self._reply(200, msgspec.json.encode(found), [(b"content-type", b"application/json")])

    async def _fetch(self, replicas: Replicas, path: str) -> tuple[Head, bytes]:
        """Return the answer of one replica, soon; of another one if it refuses or is lost. Raises NotReady."""
        ask = msgspec.structs.replace(self._ask(path), method="GET")
        tried: list[str] = []
        found: tuple[Head, bytes] | None = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PROBE_S):
                while len(tried) < _ATTEMPTS and (found is None or found[0].status in _ELSEWHERE):
                    try:
                        async with aclosing(
                            replicas.send(msgspec.structs.replace(ask, exclude=tuple(tried)))
                        ) as answer:
                            found = await _head(answer), await _rest(answer)
                    except ReplicaLost:
                        pass
                    tried.append(ask.progress.replica)
        if found is None:
            raise NotReady("no replica of the model is ready")
        return found

    async def _fail(self, error: RequestError) -> None:
        body = failures.body(error, self._dialect)
        headers = [(b"content-type", b"application/json"), *failures.headers(error)]
        await self._reply(failures.status(error, self._dialect), body, headers)

    async def _reply(self, status: int, body: bytes, headers: Headers) -> None:
        if not any(name.lower() == b"content-length" for name, _ in headers) and status != 304:
            headers = [*headers, (b"content-length", b"%d" % len(body))]
        await self._start(status, headers)
        await self._send({"type": "http.response.body", "body": b"" if self.method == "HEAD" else body})

    async def _start(self, status: int, headers: Headers) -> None:
        self._started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})


async def _body(receive: Receive, most: int) -> bytes | None:
    """Return the body, or so much of it that a server refuses it as too long; None if the client has left."""
    parts: list[bytes] = []
    size = 0
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if not message.get("more_body") or size > most:
            return b"".join(parts)[: most + 1]


def _path_of(scope: Scope) -> str:
    """Return the path as the client sent it, encoded, below the application's prefix."""
    raw = scope.get("raw_path") or scope["path"].encode()
    path: str = raw.decode("latin-1").partition("?")[0]
    root = scope.get("root_path", "").rstrip("/")
    return (path[len(root) :] or "/") if root and path.startswith(root) else path


async def _head(answer: AsyncGenerator[Head | bytes, None]) -> Head:
    try:
        head = await anext(answer)
    except StopAsyncIteration:
        raise ReplicaLost("a replica gave no answer") from None
    assert isinstance(head, Head)
    return head


async def _rest(answer: AsyncGenerator[Head | bytes, None]) -> bytes:
    return b"".join([part async for part in answer if isinstance(part, bytes)])


async def _unless_lost(found: Awaitable[Any]) -> Any:
    """Return an awaited result. Raises NotReady instead of ReplicaLost."""
    try:
        return await asyncio.wait_for(found, _PROBE_S)
    except (TimeoutError, ReplicaLost):
        raise NotReady("no replica of the model is ready") from None


def _num_generated(head: Head) -> int:
    """Return the tokens of a whole answer, 0 if it does not tell."""
    return next((int(value) for name, value in head.headers if name.lower() == b"x-generated-tokens"), 0)


def _is_stream(head: Head) -> bool:
    return any(n.lower() == b"content-type" and v.startswith(b"text/event-stream") for n, v in head.headers)


def _own(headers: Headers) -> Headers:
    """Return a server's headers without the id that Serve's proxy adds, which is the same."""
    return [(name, value) for name, value in headers if name.lower() != b"x-request-id"]
