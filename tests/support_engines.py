"""Engines that answer and stop as a test decides, and an HTTP worker's client connected to them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from tokenmill.errors import RequestError
from tokenmill.server.client import EngineClient
from tokenmill.server.engine_status import EngineStatus
from tokenmill.server.generation import GeneratedToken, Generation, MeasuredGeneration, Timings
from tokenmill.server.metrics import Metrics
from tokenmill.server.options import ServiceOptions
from tokenmill.server.peers import Peers
from tokenmill.text.detokenizer import Detokenizer
from tokenmill.text.prepare import Prepared
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.wire.channel import FrameReader, frame
from tokenmill.wire.messages import (
    Abort,
    EngineInfo,
    Output,
    Request,
    RequestTimings,
    SamplingParams,
    Stats,
    StepOutputs,
    StoppingParams,
    ToEngine,
)

INFO = EngineInfo("model", "float32", "mock", "mock", 1000, 16, 258, 300, 400, 500, 64)
TIMINGS = RequestTimings(0.5, 0.25, 0.125, num_preemptions=1, largest_batch=3, num_forced=2)


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait until `condition()` is true."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.001)


class ScriptedEngine:
    """Engine on a real socket. `requests`: unfinished ones; `received`: all; `aborted`: ids of aborts."""

    def __init__(self, address: str, info: EngineInfo = INFO) -> None:
        self.address, self.info = address, info
        self.requests: dict[int, Request] = {}
        self.received: list[Request] = []
        self.aborted: list[int] = []
        self._lengths: dict[int, int] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self.address)

    async def stop(self) -> None:
        """End as a killed process does."""
        assert self._server is not None
        self._server.close()
        self.requests.clear()
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()
        Path(self.address).unlink(missing_ok=True)
        await asyncio.sleep(0)

    def send(self, *outputs: Output, stats: Stats | None = None) -> None:
        for output in outputs:
            if output.finish_reason:
                self.requests.pop(output.request_id, None)
        message = StepOutputs(outputs, stats or Stats(running=len(self.requests)))
        for writer in self._writers:
            writer.write(frame(self._encoder, message))

    def step(self, finish: str = "") -> None:
        """Give each request its next token: the n-th of an answer is n + 1."""
        outputs = []
        for request in self.requests.values():
            length = self._lengths[request.id] = self._lengths[request.id] + 1
            timings = TIMINGS if request.wants_timings else None
            outputs.append(Output(request.id, (length + 1,), finish, timings=timings))
        self.send(*outputs)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        writer.write(frame(self._encoder, self.info))
        frames: FrameReader[list[ToEngine]] = FrameReader(list[ToEngine])
        while data := await reader.read(65536):
            for messages in frames.feed(data):
                for message in messages:
                    if isinstance(message, Abort):
                        self.aborted.append(message.id)
                        self.requests.pop(message.id, None)
                    else:
                        self.requests[message.id] = message
                        self.received.append(message)
                        self._lengths[message.id] = len(message.output_ids)


class Answers:
    """Recorder of what generations give."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.finished: dict[int, str] = {}
        self.errors: dict[int, str] = {}

    def token(self, generation: Generation, token: GeneratedToken) -> None:
        self.tokens.setdefault(generation.id, []).append(token.id)
        if token.finish:
            self.finished[generation.id] = token.finish

    def failed(self, generation: Generation, error: RequestError) -> None:
        self.errors[generation.id] = str(error)


class Cluster:
    """Scripted engines and the client of one HTTP worker. Use it with `async with`: all are connected then."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, count: int = 2, infos: dict[int, EngineInfo] = {}) -> None:  # noqa: B006 never written
        addresses = [str(folder / f"{index}.sock") for index in range(count)]
        self.engines = [ScriptedEngine(address, infos.get(index, INFO)) for index, address in enumerate(addresses)]
        self.metrics = Metrics(str(folder), 0, count)
        options = ServiceOptions(version="1", max_concurrent_requests=100)
        self.status = EngineStatus(options, self.metrics)
        self.client = EngineClient(addresses, self.status, peers=partial(Peers, str(folder), 0, 2), seed=1)
        self.answers, self.gaps = Answers(), list[float]()
        self._tokenizer = tokenizer

    async def __aenter__(self) -> Cluster:
        for engine in self.engines:
            await engine.start()
        self._task = asyncio.create_task(self.client.run())
        await until(lambda: self.num_connected == len(self.engines))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self.client.close()
        for engine in self.engines:
            await engine.stop()

    @property
    def num_connected(self) -> int:
        return sum(one.info is not None for one in self.client._connections)

    def ask(
        self, prompt_ids: tuple[int, ...] = (5, 6), *, new: int = 100, timed: bool = False, **more: object
    ) -> Generation:
        """Submit a request and return its generation."""
        prepared = Prepared(prompt_ids, SamplingParams(), StoppingParams(new, stop_ids=(0,)), (), None)
        kind = MeasuredGeneration if timed else Generation
        text = Detokenizer(self._tokenizer)
        made = kind(self.client.new_id(), prepared, text, self.answers, Timings(0.0), self.gaps.append)
        request = Request(made.id, prompt_ids, prepared.sampling, prepared.stopping, wants_timings=timed, **more)  # type: ignore[arg-type]
        self.client.submit(request, made)
        return made

    async def asked(self, count: int, **how: object) -> list[Generation]:
        """Submit requests of different prompts, and wait until the engines have them."""
        before = sum(len(engine.received) for engine in self.engines)
        made = [self.ask((7, 8, *range(2, 2 + index)), **how) for index in range(count)]  # type: ignore[arg-type]
        await until(lambda: sum(len(engine.received) for engine in self.engines) == before + count)
        return made
