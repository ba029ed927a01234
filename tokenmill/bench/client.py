"""One streaming completion over HTTP, timed event by event. Standard library only, so that the client costs little.

Speaks to any server with OpenAI's `/v1/completions`: the same client measures this server and its peers.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. `prompt` is text or token ids; `new_tokens` are generated where `ignore_eos` is known."""

    prompt: str | list[int]
    new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    model: str = "tgi"

    def body(self) -> bytes:
        """The JSON body."""
        fields: dict[str, object] = {
            "model": self.model,
            "prompt": self.prompt,
            "max_tokens": self.new_tokens,
            "temperature": self.temperature,
            "stream": True,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }
        if self.top_p != 1.0:
            fields["top_p"] = self.top_p
        if self.frequency_penalty:
            fields["frequency_penalty"] = self.frequency_penalty
        if self.seed is not None:
            fields["seed"] = self.seed
        return json.dumps(fields).encode()


@dataclass(slots=True)
class Answer:
    """What came back and when. Times are `time.perf_counter()` seconds; `events` one for each chunk with a choice."""

    sent: float
    events: list[float] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""

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
        """Generated tokens as the server counts them, else the chunks."""
        return self.completion_tokens or len(self.events)


async def complete(base_url: str, ask: Ask, *, api_key: str = "", timeout_s: float = 600.0) -> Answer:
    """Send `ask` to `base_url` and read its stream to the end. Failures are told in `Answer.error`, never raised."""
    answer = Answer(sent=time.perf_counter())
    try:
        async with asyncio.timeout(timeout_s):
            await _stream(base_url, ask, api_key, answer)
    except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    return answer


async def _stream(base_url: str, ask: Ask, api_key: str, answer: Answer) -> None:
    url, body = urlsplit(base_url), ask.body()
    reader, writer = await asyncio.open_connection(url.hostname, url.port or 80, limit=1 << 22)
    key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
    head = (
        f"POST {url.path.rstrip('/')}/v1/completions HTTP/1.1\r\nHost: {url.netloc}\r\n"
        f"Content-Type: application/json\r\n{key}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    try:
        answer.sent = time.perf_counter()
        writer.write(head.encode() + body)
        status = await reader.readline()
        if b" 200" not in status:
            answer.error = (status + await reader.read(2000)).decode(errors="replace").strip()
            return
        while line := await reader.readline():
            if line.startswith(b"data:") and not _event(line[5:].strip(), answer):
                return
    finally:
        writer.close()


def _event(data: bytes, answer: Answer) -> bool:
    """Take one event's payload; False when it was the last."""
    now = time.perf_counter()
    if data == b"[DONE]":
        return False
    chunk = json.loads(data)
    if "error" in chunk:
        answer.error = str(chunk["error"])
        return False
    if usage := chunk.get("usage"):
        answer.prompt_tokens, answer.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    if chunk.get("choices"):
        answer.events.append(now)
        answer.text += chunk["choices"][0].get("text") or ""
    return True
