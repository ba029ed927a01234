"""Send one streaming completion over HTTP and time its events. Uses the standard library only.

The client works with any server that has OpenAI's `/v1/completions`, so the same client measures this server and its
peers. Client and server often share the cores. For that reason, the bytes of a running stream are only stored with
their arrival times, and are parsed after its end.
"""

from __future__ import annotations

import asyncio
import json
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Ask:
    """Request to measure.

    `prompt`: text or token ids. `new_tokens`: number of tokens to generate, exact if the server supports `ignore_eos`.
    `schema`: a JSON schema that constrains the answer and ends it; None for none.
    """

    prompt: str | list[int]
    new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    model: str = "tgi"
    schema: dict[str, object] | None = None

    def body(self) -> bytes:
        """Encode the JSON body."""
        fields: dict[str, object] = {
            "model": self.model,
            "prompt": self.prompt,
            "max_tokens": self.new_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.schema is None:
            fields["ignore_eos"] = True
        else:
            fields["response_format"] = {"type": "json_schema", "json_schema": {"name": "a", "schema": self.schema}}
        if self.top_p != 1.0:
            fields["top_p"] = self.top_p
        if self.frequency_penalty:
            fields["frequency_penalty"] = self.frequency_penalty
        if self.presence_penalty:
            fields["presence_penalty"] = self.presence_penalty
        if self.seed is not None:
            fields["seed"] = self.seed
        return json.dumps(fields).encode()


@dataclass(slots=True)
class Answer:
    """Received answer and its times, in `time.perf_counter()` seconds.

    `events`: arrival time of each chunk with a choice. `texts`: text that each of these chunks added.
    """

    sent: float
    events: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""

    @property
    def text(self) -> str:
        """Complete text of the answer."""
        return "".join(self.texts)

    @property
    def ttft_s(self) -> float:
        """Seconds from sending to the first token."""
        return self.events[0] - self.sent if self.events else float("nan")

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between neighbouring chunks."""
        return [b - a for a, b in zip(self.events, self.events[1:], strict=False)]

    @property
    def tokens(self) -> int:
        """Number of generated tokens by the server's count, or of chunks if it sends no count."""
        return self.completion_tokens or len(self.events)


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """Options of reading a stream.

    `started`: called once, at the first token, or at the end of a stream without tokens. `cut`: an event that ends the
    stream when it is set; the bytes received so far are the answer.
    """

    api_key: str = ""
    timeout_s: float = 600.0
    started: Callable[[], None] | None = None
    cut: asyncio.Event | None = None


TO_THE_END = How()


async def complete(base_url: str, ask: Ask, how: How = TO_THE_END) -> Answer:
    """Send `ask` to `base_url` and read its stream. Failures are stored in `Answer.error`, never raised."""
    return (await receive(base_url, ask, how)).answer()


@dataclass(slots=True)
class Received:
    """Bytes of a response, each piece with its arrival time. They are not parsed yet."""

    sent: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    cut: bool = False
    error: str = ""

    def answer(self) -> Answer:
        """Parse the bytes to an answer."""
        answer = Answer(self.sent, error=self.error)
        if not self.error:
            try:
                _read(self.pieces, answer, self.cut)
            except ValueError as error:
                answer.error = f"{type(error).__name__}: {error}"
        return answer


async def receive(base_url: str, ask: Ask, how: How = TO_THE_END) -> Received:
    """As `complete`, but leave the bytes unparsed, because parsing would delay other streams."""
    receiver = _Receiver(how.started)
    received = Received(time.perf_counter(), receiver.pieces)
    try:
        async with asyncio.timeout(how.timeout_s):
            await _exchange(base_url, ask, how, received, receiver)
        received.cut = how.cut is not None and how.cut.is_set()
    except (OSError, TimeoutError, ValueError) as error:
        received.error = f"{type(error).__name__}: {error}"
    finally:
        receiver.tell()
    return received


_ROOM = 1 << 16  # maximum bytes of one read


class _Receiver(asyncio.BufferedProtocol):
    """Protocol that stores received bytes with their times, in its own buffer, as asyncio allocates one per read."""

    def __init__(self, started: Callable[[], None] | None) -> None:
        self.pieces: list[tuple[float, bytes]] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._started = started
        self._buffer = bytearray(_ROOM)

    def get_buffer(self, sizehint: int) -> bytearray:
        """Return the buffer for the next bytes."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Store received bytes with the current time."""
        data = bytes(memoryview(self._buffer)[:nbytes])
        self.pieces.append((time.perf_counter(), data))
        if self._started is not None and b"data:" in data:
            self.tell()
        if b"data: [DONE]" in data:
            self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc)

    def tell(self) -> None:
        """Call `started` if it has not been called yet."""
        if self._started is not None:
            self._started()
            self._started = None

    def _end(self, error: Exception | None) -> None:
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)


async def _exchange(base_url: str, ask: Ask, how: How, received: Received, receiver: _Receiver) -> None:
    url, body = urlsplit(base_url), ask.body()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_connection(lambda: receiver, url.hostname or "", url.port or 80)
    key = f"Authorization: Bearer {how.api_key}\r\n" if how.api_key else ""
    head = (
        f"POST {url.path.rstrip('/')}/v1/completions HTTP/1.1\r\nHost: {url.netloc}\r\n"
        f"Content-Type: application/json\r\n{key}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    try:
        received.sent = time.perf_counter()
        transport.write(head.encode() + body)
        await _first(receiver.ended, how.cut)
    finally:
        transport.close()


async def _first(ended: asyncio.Future[None], cut: asyncio.Event | None) -> None:
    """Wait for the end of the stream, or for `cut`."""
    if cut is None:
        return await ended
    waiting = asyncio.ensure_future(cut.wait())
    try:
        await asyncio.wait((ended, waiting), return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
    if ended.done():
        ended.result()


def _read(pieces: list[tuple[float, bytes]], answer: Answer, cut: bool) -> None:
    """Parse a complete or cut response into `answer`. The time of an event is that of the piece with its line's end."""
    everything = b"".join(data for _, data in pieces)
    ends: list[int] = []
    for _, data in pieces:
        ends.append((ends[-1] if ends else 0) + len(data))
    status, _, _ = everything.partition(b"\r\n")
    if b" 200" not in status:
        answer.error = everything[:2000].decode(errors="replace").strip() or "no answer"
        return
    position = 0
    for line in everything.splitlines(keepends=True):
        position += len(line)
        if line.startswith(b"data:") and line.endswith(b"\n"):
            came = pieces[bisect_left(ends, position)][0]
            if not _event(line[5:].strip(), came, answer):
                return
    answer.error = "" if cut else "the stream ended before [DONE]"


def _event(data: bytes, came: float, answer: Answer) -> bool:
    """Parse the payload of one event into `answer`; return False for the last one."""
    if data == b"[DONE]":
        return False
    chunk = json.loads(data)
    if "error" in chunk:
        answer.error = str(chunk["error"])
        return False
    if usage := chunk.get("usage"):
        answer.prompt_tokens, answer.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    if chunk.get("choices"):
        answer.events.append(came)
        answer.texts.append(chunk["choices"][0].get("text") or "")
    return True
