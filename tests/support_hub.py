"""A small local Hub that can be set to misbehave."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Answer:
    """A response of the Hub.

    `length`: value of Content-Length; None: that of the body. `cut`: bytes of the body after which the connection is
    reset; None: send the whole body. `silent`: seconds without any response.
    """

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None
    cut: int | None = None
    silent: float = 0.0


Override = Callable[[str], Answer | None]


class FakeHub:
    """Repositories by name and revision.

    `override`: called with the method and path of a request; its answer replaces the Hub's, unless it is None.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, tuple[str, dict[str, bytes]]]] = {}
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        self.override: Override = lambda request: None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def add(self, repo: str, files: dict[str, bytes], revision: str = "main") -> str:
        """Make a commit and return its id."""
        sha = hashlib.sha1(repr((repo, revision, sorted(files.items()))).encode()).hexdigest()
        revisions = self.repositories.setdefault(repo, {})
        revisions[revision] = revisions[sha] = (sha, files)
        return sha

    def fetched(self) -> list[str]:
        """Names of the files whose contents were sent."""
        return sorted(r.rpartition("/")[2] for r in self.requests if r.startswith("GET") and "/resolve/" in r)

    def close(self) -> None:
        """End the server."""
        self.server.shutdown()
        self.server.server_close()

    def answer(self, method: str, path: str) -> Answer:
        """Return the Hub's response to a request."""
        self.requests.append(f"{method} {path}")
        found = self.override(f"{method} {path}")
        if found is not None:
            return found
        path = unquote(urlsplit(path).path)
        if path.startswith("/api/models/"):
            repo, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            return self._info(repo, revision or "main")
        repo, _, rest = path[1:].partition("/resolve/")
        sha, _, name = rest.partition("/")
        files = self.repositories.get(repo, {}).get(sha, ("", {}))[1]
        if name not in files:
            return Answer(404, headers={"X-Error-Code": "EntryNotFound" if files else "RepoNotFound"})
        etag = hashlib.sha256(files[name]).hexdigest()
        return Answer(200, files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": sha})

    def _info(self, repo: str, revision: str) -> Answer:
        revisions = self.repositories.get(repo)
        if revisions is None:
            return Answer(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        if revision not in revisions:
            return Answer(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
        sha, files = revisions[revision]
        siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
        info = {"id": repo, "modelId": repo, "sha": sha, "siblings": siblings, "private": False}
        return Answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.tokens.add(self.headers.get("Authorization", ""))
            answer = hub.answer(self.command, self.path)
            start = self.headers.get("Range", "").removeprefix("bytes=").partition("-")[0]
            if start and answer.status == 200 and "ETag" in answer.headers:
                answer = Answer(206, answer.body[int(start) :], answer.headers)
            if answer.silent:
                threading.Event().wait(answer.silent)
                self.close_connection = True
                return
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body) if answer.length is None else answer.length))
            self.end_headers()
            if self.command == "HEAD":
                return
            self.wfile.write(answer.body[: answer.cut])
            if answer.cut is not None:
                self.wfile.flush()
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            if answer.length is not None or answer.cut is not None:
                self.close_connection = True

        do_HEAD = do_GET

        def log_message(self, *words: object) -> None:
            pass

    return Handler
