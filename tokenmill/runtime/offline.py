"""The engine in this process, over token ids: for tests, benchmarks, notebooks, and under `tokenmill.LLM`."""

from __future__ import annotations

import select
from collections import deque
from collections.abc import Generator, Sequence
from types import TracebackType

from tokenmill.engine.engine import Engine
from tokenmill.engine.facts import FactsLink
from tokenmill.errors import GenerationError, GrammarError
from tokenmill.runtime.assembly import Assembled
from tokenmill.runtime.guides import Guides
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
    ToScheduler,
)


class _LocalLink:
    """An `engine.Link` to the caller in the same thread."""

    def __init__(self, guides: Guides | None) -> None:
        self.messages: list[ToEngine] = []
        self.guides = guides
        self.queues: dict[int, deque[Output]] = {}  # by request: outputs that nobody has fetched
        self.stats = Stats()

    @property
    def has_work(self) -> bool:
        """Whether something was said, or a request waits that will be ready."""
        return bool(self.messages or (self.guides is not None and self.guides.holds))

    def receive(self, block: bool, plan: bytes = b"") -> list[ToScheduler]:
        """What was said since the last step; waits only for requests that will be ready."""
        messages, self.messages = self.messages, []
        if self.guides is None:
            return list(messages)
        taken = self.guides.take(messages)
        if block and not taken and self.guides.holds:
            select.select([self.guides], [], [], 1.0)
            taken = self.guides.take([])
        return taken

    def send(self, outputs: list[Output], stats: Stats) -> None:
        """Put each output where its request's reader looks."""
        self.stats = stats
        if self.guides is not None:
            outputs = self.guides.tell(outputs)
        for output in outputs:
            if (queue := self.queues.get(output.request_id)) is not None:
                queue.append(output)


class OfflineEngine:
    """Requests in, outputs out; the engine steps while somebody reads. One thread at a time; owns `parts`.

    Every request that was submitted runs whenever any is read, batched as in the server.
    """

    def __init__(self, parts: Assembled) -> None:
        self._parts = parts
        self._link = _LocalLink(parts.guides)
        self._engine = Engine(parts.scheduler, parts.executor, FactsLink(self._link, parts.scheduler))
        self._last_id = 0
        while parts.executor.idle_work():  # between two readers nobody steps: it is never idle
            pass

    @property
    def info(self) -> EngineInfo:
        """What the engine is, and its limits."""
        return self._parts.info

    @property
    def stats(self) -> Stats:
        """The books after the last step."""
        return self._link.stats

    def compile(self, grammar: GrammarSpec) -> None:
        """Wait until a grammar is compiled; requests that follow it need not wait then. GrammarError: it is none."""
        if self._parts.guides is None:
            raise GrammarError("this engine has no grammars")
        self._parts.guides.compile(grammar).result()

    def submit(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams | None = None,
        stopping: StoppingParams | None = None,
        salt: bytes = b"",
        *,
        wants_facts: bool = False,
        grammar: GrammarSpec | None = None,
    ) -> int:
        """Queue a request and return its id, for `outputs` or `abort`. Greedy, 16 tokens, if nothing else is said."""
        self._last_id += 1
        request_id = self._last_id
        sampling, stopping = sampling or SamplingParams(), stopping or StoppingParams(16)
        request = Request(
            request_id, tuple(prompt_ids), sampling, stopping, salt, wants_facts=wants_facts, grammar=grammar
        )
        self._link.messages.append(request)
        self._link.queues[request_id] = deque()
        return request_id

    def abort(self, request_id: int) -> None:
        """Forget a request; what it had to say is lost. Unknown ids are ignored."""
        if self._link.queues.pop(request_id, None) is not None:
            self._link.messages.append(Abort(request_id))

    def outputs(self, request_id: int) -> Generator[Output]:
        """What a request gives, as it comes, to the output with a finish reason. Closing the iterator aborts it.

        Raises GenerationError if the engine gave up on it.
        """
        queue = self._link.queues[request_id]
        try:
            while True:
                while not queue:
                    self._engine.step()
                output = queue.popleft()
                if output.finish_reason == "error":
                    raise GenerationError(output.message)
                yield output
                if output.finish_reason:
                    self._link.queues.pop(request_id, None)
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
        if self._engine.idle and not self._link.has_work:
            return False
        self._engine.step()
        return True

    def close(self) -> None:
        """Free the backend. Idempotent."""
        self._parts.close()

    def __enter__(self) -> OfflineEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
