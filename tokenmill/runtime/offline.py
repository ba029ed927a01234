"""Engine in the calling process, on token ids: for tests, benchmarks and notebooks, and for `tokenmill.LLM`."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from threading import Event
from types import TracebackType

from tokenmill.engine.engine import Engine
from tokenmill.errors import GenerationError, GrammarError
from tokenmill.runtime.assembly import Assembled
from tokenmill.runtime.links import links_of
from tokenmill.wire.messages import (
    Abort,
    EngineInfo,
    GrammarSpec,
    Output,
    Request,
    SamplingParams,
    Stats,
    StoppingParams,
    ToEngine,
)

_MAX_WAIT_S = 1.0


class LocalSource:
    """Source of messages in the calling process (`gated.Source`), for an engine on the same thread."""

    def __init__(self) -> None:
        self.messages: list[ToEngine] = []
        self.queues: dict[int, deque[Output]] = {}  # unread outputs by request id
        self.stats = Stats()
        self._woken = Event()

    def receive(self, block: bool, plan: bytes = b"") -> list[ToEngine]:
        """Return the messages since the last step. Only `wake` ends a wait: the caller is on the same thread."""
        messages, self.messages = self.messages, []
        if block and not messages:
            self._woken.wait(_MAX_WAIT_S)
        self._woken.clear()
        return messages

    def wake(self) -> None:
        """See `gated.Source`."""
        self._woken.set()

    def send(self, outputs: list[Output], stats: Stats) -> None:
        """Append each output to the queue of its request."""
        self.stats = stats
        for output in outputs:
            if (queue := self.queues.get(output.request_id)) is not None:
                queue.append(output)


class OfflineEngine:
    """Engine that steps while the caller reads outputs. Owns `parts`. To be used by one thread at a time.

    While the outputs of any request are read, all submitted requests run, batched as in the server.
    """

    def __init__(self, parts: Assembled) -> None:
        self._parts = parts
        self._source = LocalSource()
        link, self._gated = links_of(self._source, parts)
        self._engine = Engine(parts.scheduler, parts.executor, link)
        self._last_id = 0
        while parts.executor.idle_work():  # do all idle work now: without a reader the engine does not step
            pass

    @property
    def info(self) -> EngineInfo:
        """Properties and limits of the engine."""
        return self._parts.info

    @property
    def stats(self) -> Stats:
        """Statistics after the last step."""
        return self._source.stats

    def compile(self, grammar: GrammarSpec) -> None:
        """Compile a grammar and block until it is done. Later requests with it need not wait.

        Raise GrammarError if it is invalid, or if this engine serves no grammars.
        """
        if self._parts.constraints is None:
            raise GrammarError("this engine has no grammars")
        self._parts.constraints.compile(grammar).result()

    def submit(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams | None = None,
        stopping: StoppingParams | None = None,
        salt: bytes = b"",
        *,
        wants_timings: bool = False,
        grammar: GrammarSpec | None = None,
    ) -> int:
        """Queue a request and return its id, for `outputs`, `poll` and `abort`. Default: greedy, 16 tokens."""
        self._last_id += 1
        request_id = self._last_id
        sampling, stopping = sampling or SamplingParams(), stopping or StoppingParams(16)
        request = Request(
            request_id, tuple(prompt_ids), sampling, stopping, salt, wants_timings=wants_timings, grammar=grammar
        )
        self._source.messages.append(request)
        self._source.queues[request_id] = deque()
        return request_id

    def poll(self, request_id: int) -> list[Output]:
        """Return the unread outputs of a request, without running a step."""
        queue = self._source.queues[request_id]
        return [queue.popleft() for _ in range(len(queue))]

    def abort(self, request_id: int) -> None:
        """Cancel a request and drop its unread outputs. Unknown ids are ignored."""
        if self._source.queues.pop(request_id, None) is not None:
            self._source.messages.append(Abort(request_id))

    def outputs(self, request_id: int) -> Generator[Output]:
        """Yield the outputs of a request, up to the one with a finish reason. Closing the iterator aborts the request.

        Runs steps, and blocks, while there is no output. Raise GenerationError if the request ended with an error.
        """
        queue = self._source.queues[request_id]
        try:
            while True:
                while not queue:
                    self._engine.step()
                output = queue.popleft()
                if output.finish_reason == "error":
                    raise GenerationError(output.message)
                yield output
                if output.finish_reason:
                    self._source.queues.pop(request_id, None)
                    return
        finally:
            self.abort(request_id)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | None = None,
        stopping: StoppingParams | None = None,
    ) -> list[list[int]]:
        """Return the new token ids of each prompt. All prompts run together. Raise GenerationError as `outputs`."""
        ids = [self.submit(prompt, sampling, stopping) for prompt in prompts]
        try:
            return [[token for output in self.outputs(i) for token in output.token_ids] for i in ids]
        finally:
            for request_id in ids:
                self.abort(request_id)

    def step(self) -> bool:
        """Run one step of the engine. Return False, without a step, if there is no work."""
        if self._engine.idle and not (self._source.messages or self._gated.holds):
            return False
        self._engine.step()
        return True

    def close(self) -> None:
        """Free the backend. Idempotent."""
        self._gated.close()
        self._parts.close()

    def __enter__(self) -> OfflineEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
