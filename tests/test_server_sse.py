"""Event streams over an ASGI `send` that blocks, fails, or never returns."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from tokenmill.server.sse import MAX_BUFFERED_BYTES, EventStream, event


class Client:
    """ASGI `send` that records messages. While `gate` is shut, it blocks in the middle of sending."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.messages: list[dict[str, Any]] = []

    async def send(self, message: Any) -> None:
        if not self.gate.is_set():
            await self.gate.wait()
        self.messages.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.messages[1:])

    @property
    def complete(self) -> bool:
        return bool(self.messages) and self.messages[-1].get("more_body") is False


def test_events_are_sent_before_write_returns() -> None:
    async def main() -> None:
        client = Client()
        stream = EventStream(client.send, [(b"x-a", b"b")])
        assert not client.messages
        stream.write(event(b"1"))
        assert client.body == b"data: 1\n\n"
        assert client.messages[0]["status"] == 200
        assert (b"x-a", b"b") in client.messages[0]["headers"]
        stream.end(event(b"2"))
        assert client.complete
        assert stream.done.done()
        stream.write(event(b"3"))
        assert client.body == b"data: 1\n\ndata: 2\n\n"

    asyncio.run(main())


def test_nothing_is_lost_or_reordered_however_the_client_reads() -> None:
    async def main(seed: int) -> None:
        random_numbers = random.Random(seed)
        client = Client()
        stream = EventStream(client.send, [])
        wanted = b""
        for number in range(60):
            client.gate.set() if random_numbers.random() < 0.5 else client.gate.clear()
            data = event(b"%d" % number)
            wanted += data
            stream.write(data)
            if random_numbers.random() < 0.3:
                await asyncio.sleep(0)
        client.gate.set() if random_numbers.random() < 0.5 else client.gate.clear()
        stream.end(event(b"end"))
        await asyncio.sleep(0)
        client.gate.set()
        await asyncio.wait_for(stream.done, 5)
        assert client.body == wanted + event(b"end")
        assert client.complete
        assert [m.get("more_body") for m in client.messages[1:]].count(False) == 1

    for seed in range(50):
        asyncio.run(main(seed))


def test_a_client_that_never_reads_costs_a_bounded_amount_of_memory() -> None:
    async def main() -> None:
        client = Client()
        stream = EventStream(client.send, [])
        client.gate.clear()
        written = 0
        while not stream.overflowed:
            stream.write(b"x" * 1000)
            written += 1000
            assert written <= MAX_BUFFERED_BYTES + 2000
        assert stream.done.done()
        await asyncio.sleep(0)
        client.gate.set()
        await asyncio.sleep(0)
        assert not client.complete  # cut off, not ended in order

    asyncio.run(main())


def test_a_client_that_takes_nothing_is_cut_off_even_after_the_end() -> None:
    async def main(ended: bool) -> None:
        client = Client()
        stream = EventStream(client.send, [], stall_s=0.1)
        stream.write(event(b"1"))
        client.gate.clear()
        stream.write(event(b"2"))
        if ended:
            stream.end(event(b"3"))
        await asyncio.sleep(0.05)
        assert not stream.done.done()
        await asyncio.wait_for(stream.done, 1)
        assert stream.overflowed
        assert not client.complete

    asyncio.run(main(False))
    asyncio.run(main(True))


def test_a_client_that_takes_little_by_little_is_not() -> None:
    async def main() -> None:
        client = Client()
        stream = EventStream(client.send, [], stall_s=0.1)
        for _ in range(5):
            client.gate.clear()
            stream.write(event(b"1"))
            await asyncio.sleep(0.06)
            client.gate.set()
            await asyncio.sleep(0.01)
        stream.end()
        await asyncio.sleep(0.15)
        assert stream.done.done()
        assert not stream.overflowed
        assert client.complete

    asyncio.run(main())


def test_a_silent_stream_gets_comments_and_a_busy_one_none() -> None:
    async def main() -> None:
        silent, busy, loop = Client(), Client(), asyncio.get_running_loop()
        begin = loop.time()
        streams = EventStream(silent.send, [], keep_alive_s=0.1), EventStream(busy.send, [], keep_alive_s=0.1)
        for _ in range(25):
            await asyncio.sleep(0.01)
            streams[1].write(event(b"1"))
        comments = silent.body.count(b":\n\n")
        assert silent.body == b":\n\n" * comments
        assert 1 <= comments <= (loop.time() - begin) / 0.1
        assert b":\n\n" not in busy.body.replace(b"data: 1\n\n", b"")
        for stream in streams:
            stream.close()

    asyncio.run(main())


def test_a_closed_stream_never_started_leaves_room_for_an_ordinary_answer() -> None:
    async def main() -> None:
        client = Client()
        stream = EventStream(client.send, [])
        stream.close()
        assert stream.done.done()
        assert not stream.started
        assert not client.messages

    asyncio.run(main())


def test_a_broken_connection_ends_the_stream() -> None:
    async def main() -> None:
        async def send(message: Any) -> None:
            raise BrokenPipeError

        stream = EventStream(send, [])
        stream.write(event(b"1"))
        assert stream.done.done()

    asyncio.run(main())
