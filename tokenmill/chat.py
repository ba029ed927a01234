"""`tokenmill chat`: a conversation in the terminal with a running server, or with one that the command starts.

Ctrl-C stops the answer; Ctrl-D or /exit ends the program. HTTP requests use the standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

from tokenmill import fetch, progress
from tokenmill.config import Settings
from tokenmill.errors import StartError
from tokenmill.options import Parser
from tokenmill.parent import die_with_parent

_HELP = """/clear forgets the conversation, /system TEXT begins a new one with a system message,
/retry answers the last message again, /exit (or Ctrl-D) ends. Ctrl-C stops an answer."""
_START_S = 300.0


class ServerError(Exception):
    """Error for a request that the server refused or aborted. The message is for the user."""


class Conversation:
    """Messages of the conversation, and the server that answers. `options`: sent with every request."""

    def __init__(self, url: str, api_key: str, options: dict[str, Any]) -> None:
        self._url = urllib.parse.urlsplit(url)
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._options = options
        self.messages: list[dict[str, str]] = []

    def say(self, text: str) -> Iterator[str]:
        """Send a message and yield the answer in pieces. Received pieces stay in the history, even after an error."""
        self.messages.append({"role": "user", "content": text})
        answer: list[str] = []
        try:
            for piece in self._stream():
                answer.append(piece)
                yield piece
        finally:
            if answer:
                self.messages.append({"role": "assistant", "content": "".join(answer)})
            else:
                self.messages.pop()  # a message without an answer leaves the history

    def take_back(self) -> str | None:
        """Remove the last message and its answer from the history, and return the message; None if there is none."""
        while self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        return self.messages.pop()["content"] if self.messages and self.messages[-1]["role"] == "user" else None

    def _stream(self) -> Iterator[str]:
        body = json.dumps({"model": "tgi", "messages": self.messages, "stream": True, **self._options})
        with contextlib.closing(connect(self._url)) as connection:
            try:
                connection.request("POST", self._url.path.rstrip("/") + "/v1/chat/completions", body, self._headers)
                response = connection.getresponse()
                if response.status != 200:
                    raise ServerError(reason(response.read()))
                yield from deltas(response)
            except (OSError, http.client.HTTPException) as error:
                raise ServerError(f"The connection to the server was lost: {error!r}") from None


def connect(url: urllib.parse.SplitResult) -> http.client.HTTPConnection:
    """Create a connection to the server of a URL, without opening it."""
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    return kind(url.hostname or "127.0.0.1", url.port, timeout=600)


def deltas(lines: Iterator[bytes] | http.client.HTTPResponse) -> Iterator[str]:
    """Yield the content of a stream of chat completion chunks. Raises ServerError if an event is an error."""
    for line in lines:
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or data == b"[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise ServerError(reason(data))
        for choice in event.get("choices", ()):
            if content := choice["delta"].get("content"):
                yield content


def reason(body: bytes) -> str:
    """Extract the message from an error body in OpenAI's or TGI's form."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:500]
    return str(error["message"] if isinstance(error, dict) else error)


def health(url: str) -> int:
    """Return the status of /health; 0 if no server listens there."""
    split = urllib.parse.urlsplit(url)
    try:
        with contextlib.closing(connect(split)) as connection:
            connection.timeout = 5
            connection.request("GET", split.path.rstrip("/") + "/health")
            return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0


@contextlib.contextmanager
def own_server(settings: Settings) -> Iterator[str]:
    """Start a server on a free local port, yield its URL once it is ready, and stop it at the end."""
    screen = progress.display()
    try:
        source = fetch.fetch(settings, screen.progress)
    finally:
        screen.close()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tokenmill", "serve", "--hostname", "127.0.0.1", "--port", str(port),
               "--model-id", source.given, "--log-level", "error"]  # fmt: skip
    print(f"Starting a server for {source.model_id} …", flush=True)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL, process_group=0,
                               preexec_fn=die_with_parent)  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + _START_S
        while health(url) != 200:
            if process.poll() is not None:
                raise StartError("The server did not start; its message is above.")
            if time.monotonic() > deadline:
                raise StartError(f"The server was not ready within {_START_S:g} s.")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def converse(conversation: Conversation) -> None:
    """Read messages, send them and print the answers, until the input ends."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for `input`
    print(_HELP, flush=True)
    while True:
        try:
            text = input("\n> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit ends)")
            continue
        if text in ("/exit", "/quit"):
            return
        if text and (text := _command(conversation, text)):
            _answer(conversation, text)


def _command(conversation: Conversation, text: str) -> str:
    """Execute a line that begins with a slash, and return the text to send to the model; "" for none."""
    word, _, rest = text.partition(" ")
    if word in ("/clear", "/system"):
        conversation.messages = [{"role": "system", "content": rest}] if rest and word == "/system" else []
        print("A new conversation.")
        return ""
    if word == "/retry":
        return conversation.take_back() or ""
    if word == "/help" or (word.startswith("/") and word[1:].isalpha()):
        print(_HELP)
        return ""
    return text


def _answer(conversation: Conversation, text: str) -> None:
    pieces = conversation.say(text)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" [stopped]")
    except ServerError as error:
        print(f"\nError: {error}", file=sys.stderr)
    finally:
        pieces.close()  # type: ignore[attr-defined]  # a generator: closing it closes the connection, which aborts


def main(words: list[str]) -> int:
    """Run the command and return the exit code. Raises StartError if no server runs and none can be started."""
    given = _parser().parse_args(words)
    wanted = {"max_tokens": given.max_tokens, "temperature": given.temperature, "seed": given.seed}
    options = {name: value for name, value in wanted.items() if value is not None}
    settings = Settings.from_env(model_id=given.model_id) if given.model_id else Settings.from_env()
    with contextlib.ExitStack() as stack:
        url = given.url or f"http://127.0.0.1:{settings.port}"
        if given.model_id or (not given.url and health(url) == 0):
            url = stack.enter_context(own_server(settings))
        elif health(url) != 200:
            raise StartError(f"No server is ready at {url}. Start one with `tokenmill serve`, or leave --url out.")
        print(f"Talking to {url}.", end=" ")
        conversation = Conversation(url, settings.api_key, options)
        if given.system:
            conversation.messages = [{"role": "system", "content": given.system}]
        if given.message:
            _answer(conversation, given.message)
        else:
            converse(conversation)
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "Talk to the server at --url (by default the one on this machine); if none runs, one is started."
    parser = Parser(prog="tokenmill chat", description=about)
    parser.add_argument("--url", default="", help="a server's address, as http://host:3000")
    parser.add_argument("--model-id", default="", help="start a server of this model (Hub id, folder, .gguf file)")
    parser.add_argument("--system", default="", metavar="TEXT", help="system message")
    parser.add_argument("--message", default="", metavar="TEXT", help="send this, print the answer, end")
    parser.add_argument("--max-tokens", type=int, metavar="N", default=1024)
    about_t = "0: greedy; 0.3 by default, for small models ramble at 1"
    parser.add_argument("--temperature", type=float, metavar="T", default=0.3, help=about_t)
    parser.add_argument("--seed", type=int, metavar="N")
    return parser
