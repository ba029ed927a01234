"""What every handler of an HTTP worker shares: the tokenizer, the engine's client, limits, permits, metrics, the phase.

One per worker, built by `worker.py`, used from the event loop only. The port answers before the model is there; until
then `phase` says what is being waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec

from tokenmill.errors import NotReady, Overloaded, RequestError
from tokenmill.server import digests, failures
from tokenmill.server.client import EngineClient
from tokenmill.server.generation import Generation
from tokenmill.server.metrics import Metrics
from tokenmill.text.options import Dialect, Options, RequestLimits
from tokenmill.text.prepare import Prepared, prepare
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.wire.messages import EngineInfo, Stats

_SHORT_PROMPT = 2000
"""Characters up to which encoding takes less than handing it to a thread and back would."""

NO_STATS = Stats()

T = TypeVar("T")


class ServiceOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of a server that its HTTP workers follow."""

    version: str
    max_concurrent_requests: int  # of this worker
    max_best_of: int = 2
    max_stop_sequences: int = 4
    max_top_n_tokens: int = 5
    max_client_batch_size: int = 4
    payload_limit: int = 2_000_000  # bytes
    validation_workers: int = 2
    api_key: str = ""
    cors_allow_origin: tuple[str, ...] = ()
    compute_type: str = ""
    protect_metrics: bool = False
    strict_model_name: bool = False
    configured_concurrent_requests: int = 128  # of all workers, as `/info` shows it
    docker_label: str = ""
    aip_predict_route: str = ""  # Vertex AI: one more path of /vertex
    aip_health_route: str = ""  # and of /health
    watermark_gamma: float = 0.5
    watermark_delta: float = 2.0
    grammars: bool = True  # whether requests may ask for one
    tool_call_parser: str = ""  # "": found from the chat template
    reasoning_parser: str = ""
    numerics: str = ""  # settings that may change what is computed


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """The model as text knows it."""

    id: str
    revision: str
    tokenizer: Tokenizer
    created: int  # Unix seconds
    digest: str = ""  # see `digests.model_digest`


class Service:
    """See the module. `run_dir` holds the metrics of all workers, `address` is the engine's socket."""

    def __init__(self, options: ServiceOptions, *, address: str, run_dir: str, index: int = 0) -> None:
        self.options = options
        self.metrics = Metrics(run_dir, index)
        self.client = EngineClient(address, self)
        self.model: Model | None = None
        self.limits: RequestLimits | None = None
        self.fingerprint = self.engine_digest = self.engine_name = ""  # of the engine last connected
        self.phase = "starting"
        self.draining = False
        self.stats: Stats | None = None  # the engine's last
        self.in_flight = 0
        self.became_ready = asyncio.Event()
        self._threads = ThreadPoolExecutor(options.validation_workers, thread_name_prefix="encode")

    # --- the engine's watcher -----------------------------------------------------------------------------------

    def connected(self, info: EngineInfo) -> None:
        """See `client.Watcher`."""
        options = self.options
        self.limits = RequestLimits(
            max_input_tokens=info.max_input_tokens,
            max_total_tokens=info.max_total_tokens,
            max_stop_sequences=options.max_stop_sequences,
            max_best_of=options.max_best_of,
            max_top_n_tokens=options.max_top_n_tokens,
            vocab_size=info.vocab_size,
            watermark_gamma=options.watermark_gamma,
            watermark_delta=options.watermark_delta,
            grammars=options.grammars,
        )
        model = self.model.digest if self.model else ""
        self.engine_name = " ".join(filter(None, (info.backend, info.device, info.dtype, info.quantize)))
        self.engine_digest = digests.engine_digest(info, options.version, options.numerics)
        self.fingerprint = digests.fingerprint(options.version, options.docker_label, model, self.engine_digest)
        self.stats = None
        self.metrics.set_limits(info.max_input_tokens, info.max_total_tokens)
        self.metrics.set("tgi_batch_max_total_tokens", info.capacity)
        self.metrics.set("tokenmill_kv_blocks", info.num_blocks)
        self.metrics.set("tokenmill_engine_up", 1.0)
        self.metrics.set_info(
            version=options.version, model=info.model_id, revision=info.revision, dtype=info.dtype,
            quantize=info.quantize, backend=info.backend, device=info.device, shards=str(info.num_shard),
        )  # fmt: skip
        self.phase = "ready"
        self.became_ready.set()

    def lost(self) -> None:
        """See `client.Watcher`."""
        if self.in_flight and self.stats is not None:
            self.metrics.add("tgi_batch_inference_failure", "prefill" if self.stats.prefill_rows else "decode")
        self.metrics.set("tokenmill_engine_up", 0.0)
        for name in ("tgi_batch_current_size", "tgi_queue_size", "tgi_batch_current_max_tokens",
                     "tokenmill_kv_blocks_used", "tokenmill_kv_usage_ratio"):  # fmt: skip
            self.metrics.set(name, 0.0)
        self.phase = "the engine is restarting"
        self.became_ready.clear()

    def stepped(self, stats: Stats, num_outputs: int, handling_s: float) -> None:
        """See `client.Watcher`."""
        before, self.stats = self.stats, stats
        if before is None:  # an engine that has been working counted its past steps with a worker before us
            before = NO_STATS if stats.steps <= 1 else stats
        metrics = self.metrics
        metrics.heard(asyncio.get_running_loop().time())
        block_size = self.client.info.block_size if self.client.info else 0
        metrics.set("tgi_queue_size", stats.waiting)
        metrics.set("tgi_batch_current_size", stats.running)
        metrics.set("tgi_batch_current_max_tokens", stats.blocks_used * block_size)
        metrics.set("tokenmill_kv_blocks_used", stats.blocks_used)
        metrics.set("tokenmill_kv_usage_ratio", stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0)
        if failures := stats.retracted - before.retracted:
            metrics.add("tgi_batch_inference_failure", "prefill" if before.prefill_rows else "decode", amount=failures)
        num_steps = stats.steps - before.steps
        if num_steps <= 0:
            return
        method = "prefill" if stats.prefill_rows or stats.admitted else "decode"  # a prompt may be one token, or cached
        metrics.add("tgi_batch_inference_count", method, amount=num_steps)
        metrics.add("tgi_batch_inference_success", method, amount=num_steps)
        metrics.observe("tgi_batch_inference_duration", stats.step_s, method)
        metrics.observe("tgi_batch_forward_duration", stats.step_s, method)
        metrics.observe("tgi_batch_filter_duration", 0.0, method)
        if num_outputs:
            metrics.observe("tgi_batch_decode_duration", handling_s, method)
        if stats.admitted:
            metrics.observe("tgi_batch_next_size", stats.admitted)
            if stats.batch_size > stats.admitted:
                metrics.add("tgi_batch_concat", "chunking")
                metrics.observe("tgi_batch_concat_duration", 0.0, "decode")
        metrics.add("tokenmill_prefill_tokens_total", amount=stats.prefill_tokens - before.prefill_tokens)
        metrics.add("tokenmill_decode_tokens_total", amount=stats.decode_tokens - before.decode_tokens)
        metrics.add("tokenmill_preemptions_total", amount=stats.preemptions - before.preemptions)

    # --- what handlers ask for ----------------------------------------------------------------------------------

    def ready(self) -> tuple[Model, RequestLimits, EngineInfo]:
        """The model, the limits and the engine. Raises NotReady with the phase."""
        if self.draining:
            raise NotReady("the server is shutting down")
        info = self.client.info
        if self.model is None or self.limits is None or info is None:
            raise NotReady(self.phase)
        return self.model, self.limits, info

    def check_health(self) -> None:
        """Raises NotReady unless a request would be served now."""
        self.ready()
        if not self.client.healthy:
            raise NotReady("unhealthy: the engine does not answer")

    def take(self, count: int) -> None:
        """Take `count` permits, one a sequence. Raises Overloaded, at once, if there are not as many."""
        if self.in_flight + count > self.options.max_concurrent_requests:
            raise Overloaded
        self.in_flight += count
        self.metrics.set("tokenmill_requests_in_flight", self.in_flight)

    def release(self, count: int) -> None:
        """Give permits back."""
        self.in_flight -= count
        self.metrics.set("tokenmill_requests_in_flight", self.in_flight)

    async def prepare(
        self,
        prompt: str | list[int],
        options: Options,
        dialect: Dialect,
        *,
        stream: bool,
        add_special_tokens: bool = True,
    ) -> Prepared:
        """Check options and encode the prompt, a long one in a thread. Raises ValidationError, NotReady."""
        model, limits, _ = self.ready()

        def work() -> Prepared:
            return prepare(
                prompt, options, limits, model.tokenizer,
                add_special_tokens=add_special_tokens, dialect=dialect, stream=stream,
            )  # fmt: skip

        if len(prompt) <= _SHORT_PROMPT and not isinstance(options.grammar, dict):  # whose schema may be long
            return work()
        return await self.in_thread(work)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run `work`, which must touch nothing of the event loop's, in one of the encoding threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    # --- what is counted ----------------------------------------------------------------------------------------

    def count_prepared(self, prepared: Prepared) -> None:
        """A request passed validation."""
        self.metrics.observe("tgi_request_input_length", prepared.num_prompt)
        self.metrics.observe("tgi_request_max_new_tokens", prepared.stopping.max_new_tokens)

    def observe_gap(self, seconds: float) -> None:
        """Seconds between two tokens of a sequence."""
        self.metrics.observe("tokenmill_inter_token_latency_seconds", seconds)

    def count_sequence(self, generation: Generation) -> None:
        """A sequence is complete."""
        metrics, times = self.metrics, generation.timings
        metrics.observe("tokenmill_time_to_first_token_seconds", times.first - times.arrived)
        metrics.add("tokenmill_prompt_tokens_total", amount=generation.prepared.num_prompt)
        metrics.add("tokenmill_cached_prompt_tokens_total", amount=generation.num_cached)
        metrics.add("tokenmill_generated_tokens_total", amount=generation.num_generated)

    def count_success(self, generation: Generation) -> None:
        """A prompt has its answer; of several copies of it (`best_of`, `n`) the first is counted, as TGI does."""
        metrics, times, count = self.metrics, generation.timings, generation.num_generated
        metrics.add("tgi_request_success")
        metrics.observe("tgi_request_duration", times.last - times.arrived)
        metrics.observe("tgi_request_validation_duration", times.submitted - times.arrived)
        metrics.observe("tgi_request_queue_duration", times.admitted - times.submitted)
        metrics.observe("tgi_request_inference_duration", times.last - times.admitted)
        metrics.observe("tgi_request_mean_time_per_token_duration", (times.last - times.admitted) / max(count, 1))
        metrics.observe("tgi_request_generated_tokens", count)
        metrics.add_summary("tgi_request_skipped_tokens", count, 0.0)

    def count_failure(self, error: RequestError) -> None:
        """A request failed."""
        label = failures.failure_label(error)
        if label is not None:
            self.metrics.add("tgi_request_failure", label)

    def count_dropped(self) -> None:
        """The client left before the end."""
        self.metrics.add("tgi_request_failure", "dropped")

    def close(self) -> None:
        """Stop threads and close the connection. Idempotent."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.client.close()
