"""The ASGI application: finds a request's route, and adds request ids, the API key, CORS, and errors as answers."""

from __future__ import annotations

import hmac
import logging
import secrets
from collections.abc import Awaitable, Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenmill.errors import GenerationError, RequestError
from tokenmill.server import access, failures
from tokenmill.server.call import Call, ClientGone
from tokenmill.server.cors import Cors
from tokenmill.server.protocol import ABORT
from tokenmill.server.routes.route import Route
from tokenmill.server.routes.table import ROUTES, vertex_routes
from tokenmill.server.service import Service
from tokenmill.server.sse import Headers
from tokenmill.server.tracing import Tracer

log = logging.getLogger(__name__)


def create_app(service: Service, tracer: Tracer | None = None) -> ASGIApp:
    """Return the application of one worker. `tracer`: records each request that has ended; None: no spans are sent."""
    options = service.options
    routes = ROUTES + vertex_routes(options.aip_predict_route, options.aip_health_route)
    return App(service, routes, tracer)


class App:
    """ASGI application: finds the route, checks the key, runs the handler, answers errors."""

    def __init__(self, service: Service, routes: tuple[Route, ...], tracer: Tracer | None) -> None:
        self._service, self._tracer = service, tracer
        self._exact: dict[str, dict[str, Route]] = {}
        prefixes: dict[str, dict[str, Route]] = {}
        for route in routes:
            if route.path.endswith("/*"):
                prefixes.setdefault(route.path[:-1], {})[route.method] = route
            else:
                self._exact.setdefault(route.path, {})[route.method] = route
        self._prefixes = tuple(prefixes.items())
        self._cors = Cors(service.options.cors_allow_origin)
        self._key = _words(f"bearer {service.options.api_key}".encode()) if service.options.api_key else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. See ASGI."""
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        methods, rest = self._find(scope["path"])
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        route = methods.get(method)
        request_id = _request_id(scope)
        common: Headers = [*self._cors.headers(scope), (b"x-request-id", request_id)]
        if self._service.draining:  # the client's next request goes to another server
            common.append((b"connection", b"close"))
        dialect = route.dialect if route else failures.dialect_of(scope["path"])
        call = Call(self._service, scope, receive, _with_headers(send, common), dialect, rest)
        name = route.path.removesuffix("/*") if route else "other"
        call.request_id, call.route = request_id.decode(), name
        try:
            if method == "OPTIONS":
                await call.reply(200, b"", self._cors.preflight(scope))
            elif route is None:
                await _answer_nowhere(call, methods)
            else:
                await self._run(route, call)
        except ClientGone:  # abort: an orderly close would wait for a client that does not read
            call.status = 499
            scope.get(ABORT, _nothing)()
            if route and route.generates:
                self._service.requests.dropped()
        finally:
            call.close()
            self._service.metrics.count_response(name, call.status)
            if call.status >= 400:
                access.refused(call)
            if self._tracer is not None:
                self._tracer.record(call)

    async def _run(self, route: Route, call: Call) -> None:
        if not self._allowed(route, call):
            await self._refuse(route, call)
            return
        try:
            if route.generates:
                call.counts_failures = True
                self._service.metrics.add("tgi_request_count")
            await route.handler(call)
        except RequestError as error:
            log.log(logging.ERROR if isinstance(error, GenerationError) else logging.DEBUG, "%s", error)
            await call.fail(error)
        except ClientGone:
            raise
        except Exception as error:
            log.exception("%s %s failed", route.method, route.path)
            await call.fail(InternalError(f"Server error: {type(error).__name__}"))

    def _find(self, path: str) -> tuple[dict[str, Route], str]:
        found = self._exact.get(path)
        if found is not None:
            return found, ""
        for prefix, methods in self._prefixes:
            if path.startswith(prefix) and len(path) > len(prefix):
                return methods, path[len(prefix) :]
        return {}, ""

    def _allowed(self, route: Route, call: Call) -> bool:
        protected = route.protected or (route.path == "/metrics" and self._service.options.protect_metrics)
        if not self._key or not protected:
            return True
        return hmac.compare_digest(_words(call.header(b"authorization")), self._key)

    async def _refuse(self, route: Route, call: Call) -> None:
        error = failures.Unauthorized("The API key is missing or wrong: send `Authorization: Bearer <key>`")
        if route.dialect == "openai":
            await call.fail(error)
        else:  # TGI's 401 has no body
            await call.reply(401, b"", failures.headers(error))


def _words(credentials: bytes) -> bytes:
    """Return credentials in lower case, as TGI compares them, with one blank between scheme and key."""
    return b" ".join(credentials.strip().split(None, 1)).lower()


async def _answer_nowhere(call: Call, methods: Iterable[str]) -> None:
    """Answer 404, or 405 if there are other `methods`. TGI's have no body; OpenAI's and KServe's have one."""
    path = call.scope["path"]
    error = failures.nowhere(call.scope["method"], path, methods)
    if call.dialect == "openai" or path == "/v2" or path.startswith("/v2/"):
        await call.fail(error)
    else:
        await call.reply(failures.status(error, "native"), b"", failures.headers(error))


class InternalError(RequestError):
    """A bug of this server in one request."""


async def lifespan(receive: Receive, send: Send) -> None:
    """Answer the messages of ASGI's lifespan until the shutdown. There is nothing to start or end."""
    while True:
        message: Message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return


def _nothing() -> None:
    """Do nothing: for servers that give no way to drop a connection."""


def _request_id(scope: Scope) -> bytes:
    """Return the client's own id if it is a short word of visible ASCII, else a new one."""
    for key, value in scope["headers"]:
        if key == b"x-request-id" and 0 < len(value) <= 128 and all(0x21 <= byte <= 0x7E for byte in value):
            return bytes(value)
    return secrets.token_hex(16).encode()


def _with_headers(send: Send, common: Headers) -> Send:
    def send_with_headers(message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *common]
        return send(message)

    return send_with_headers
