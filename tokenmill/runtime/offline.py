"""The engine in this process, over token ids: for tests, benchmarks, notebooks, and under `tokenmill.LLM`."""

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


class Local:
    """The outermost link of an engine in this process: a `gated.Source` to the caller, in the same thread."""

    def __init__(self) -> None:
        self.messages: list[ToEngine] = []
        self.queues: dict[int, deque[Output]] = {}  # by request: outputs that were not read yet
        self.stats = Stats()
        self._woken = Event()

    def receive(self, block: bool, plan: bytes = b"") -> list[ToEngine]:
        """Return the messages since the last step. There can be none during a wait, so that ends by `wake` alone."""
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
    """Requests in, outputs out; the engine steps while somebody reads. One thread at a time; owns `parts`.

    Every request that was submitted runs whenever any is read, batched as in the server.
    """

    def __init__(self, parts: Assembled) -> None:
        self._parts = parts
        self._local = Local()
        link, self._gated = links_of(self._local, parts)
        self._engine = Engine(parts.scheduler, parts.executor, link)
        self._last_id = 0
        while parts.executor.idle_work():  # between two readers nobody steps: it is never idle
            pass

    @property
    def info(self) -> EngineInfo:
        """The description of the engine, with its limits."""
        return self._parts.info

    @property
    def stats(self) -> Stats:
        """The books after the last step."""
        return self._local.stats

    def compile(self, grammar: GrammarSpec) -> None:
        """Wait until a grammar is compiled; requests that follow it need not wait then. GrammarError: it is none."""
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
        """Queue a request and return its id, for `outputs` or `abort`. Greedy, 16 tokens, if nothing else is said."""
        self._last_id += 1
        request_id = self._last_id
        sampling, stopping = sampling or SamplingParams(), stopping or StoppingParams(16)
        request = Request(
            request_id, tuple(prompt_ids), sampling, stopping, salt, wants_timings=wants_timings, grammar=grammar
        )
        self._local.messages.append(request)
        self._local.queues[request_id] = deque()
        return request_id

    def poll(self, request_id: int) -> list[Output]:
        """Return the outputs of a request that were not read yet. Never steps."""
        queue = self._local.queues[request_id]
        return [queue.popleft() for _ in range(len(queue))]

    def abort(self, request_id: int) -> None:
        """Forget a request; what it had to say is lost. Unknown ids are ignored."""
        if self._local.queues.pop(request_id, None) is not None:
            self._local.messages.append(Abort(request_id))

    def outputs(self, request_id: int) -> Generator[Output]:
        """Yield the outputs of a request as they come, to the one with a finish reason. Closing the iterator aborts it.

        Raises GenerationError if the engine gave up on it.
        """
        queue = self._local.queues[request_id]
        try:
            while True:
                while not queue:
                    self._engine.step()
                output = queue.popleft()
                if output.finish_reason == "error":
                    raise GenerationError(output.message)
                yield output
                if output.finish_reason:
                    self._local.queues.pop(request_id, None)
                    return
        finally:
            self.abort(request_id)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | None = None,
        stopping: StoppingParams | None = None,
    ) -> list[list[int]]:
        """The new token ids of each prompt, all run together."""
        ids = [self.submit(prompt, sampling, stopping) for prompt in prompts]
        try:
            return [[token for output in self.outputs(i) for token in output.token_ids] for i in ids]
        finally:
            for request_id in ids:
                self.abort(request_id)

    def step(self) -> bool:
        """One turn of the engine; False, doing nothing, if there is nothing to do."""
        if self._engine.idle and not (self._local.messages or self._gated.holds):
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
