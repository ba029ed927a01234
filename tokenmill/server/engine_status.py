"""EngineStatus: follows the engine's connection and its steps, and records them in the metrics."""

from __future__ import annotations

import asyncio

import msgspec

from tokenmill.server import digests
from tokenmill.server.metrics import Metrics
from tokenmill.server.options import ServiceOptions
from tokenmill.text.options import RequestLimits
from tokenmill.wire.messages import EngineInfo, Stats

_NO_STATS = Stats()


class Engine(msgspec.Struct, frozen=True):
    """A connected engine. `limits`: of each request; `digest`: see `digests.engine_digest`; `fingerprint`: the
    `system_fingerprint` of its answers."""

    info: EngineInfo
    limits: RequestLimits
    name: str
    digest: str
    fingerprint: str


class EngineStatus:
    """Status of the engine as one worker sees it. For the event loop only.

    `phase`: "ready", or the part of the start that is being waited for. `engine`: the one last connected, also while it
    is lost. `became_ready`: set while an engine is connected.
    """

    def __init__(self, options: ServiceOptions, metrics: Metrics) -> None:
        self.phase = "starting"
        self.engine: Engine | None = None
        self.became_ready = asyncio.Event()
        self._options, self._metrics = options, metrics
        self._model_digest = ""
        self._stats: Stats | None = None  # the engine's last

    def set_model(self, digest: str) -> None:
        """Set the model's digest, a part of the fingerprint. Call it before an engine is connected."""
        self._model_digest = digest

    def connected(self, info: EngineInfo) -> None:
        """Record that a connection to an engine stands."""
        options, metrics = self._options, self._metrics
        digest = digests.engine_digest(info, options.version, options.numerics)
        self.engine = Engine(
            info,
            limits_of(options, info),
            " ".join(filter(None, (info.backend, info.device, info.dtype, info.quantize))),
            digest,
            digests.fingerprint(options.version, options.docker_label, self._model_digest, digest),
        )
        self._stats = None
        metrics.set_limits(info.max_input_tokens, info.max_total_tokens)
        metrics.set("tgi_batch_max_total_tokens", info.capacity)
        metrics.set("tokenmill_kv_blocks", info.num_blocks)
        metrics.set("tokenmill_engine_up", 1.0)
        metrics.set_info(
            version=options.version, model=info.model_id, revision=info.revision, dtype=info.dtype,
            quantize=info.quantize, backend=info.backend, device=info.device, shards=str(info.num_shard),
        )  # fmt: skip
        self.phase = "ready"
        self.became_ready.set()

    def lost(self, num_requests: int) -> None:
        """Record that the connection is gone, and `num_requests` running requests with it."""
        if num_requests and self._stats is not None:
            self._metrics.add("tgi_batch_inference_failure", "prefill" if self._stats.prefill_rows else "decode")
        self._metrics.set("tokenmill_engine_up", 0.0)
        for name in ("tgi_batch_current_size", "tgi_queue_size", "tgi_batch_current_max_tokens",
                     "tokenmill_kv_blocks_used", "tokenmill_kv_usage_ratio"):  # fmt: skip
            self._metrics.set(name, 0.0)
        self.phase = "the engine is restarting"
        self.became_ready.clear()

    def stepped(self, stats: Stats, num_outputs: int, handling_s: float) -> None:
        """Record a step's statistics, its number of outputs, and the seconds that handling them took."""
        before, self._stats = self._stats, stats
        if before is None:  # the earlier steps of a running engine were counted by an earlier worker
            before = _NO_STATS if stats.steps <= 1 else stats
        metrics = self._metrics
        metrics.heard(asyncio.get_running_loop().time())
        capacity = self.engine.info.capacity if self.engine else 0
        used = stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0
        metrics.set("tgi_queue_size", stats.waiting)
        metrics.set("tgi_batch_current_size", stats.running)
        metrics.set("tgi_batch_current_max_tokens", round(used * capacity))
        metrics.set("tokenmill_kv_blocks_used", stats.blocks_used)
        metrics.set("tokenmill_kv_usage_ratio", used)
        if failures := stats.retracted - before.retracted:
            metrics.add("tgi_batch_inference_failure", "prefill" if before.prefill_rows else "decode", amount=failures)
        if stats.steps > before.steps:
            self._count_steps(before, stats, num_outputs, handling_s)

    def _count_steps(self, before: Stats, stats: Stats, num_outputs: int, handling_s: float) -> None:
        """Record the steps since `before`. TGI has metrics by the kind of batch: a prompt's, or a decoding one."""
        metrics, num_steps = self._metrics, stats.steps - before.steps
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


def limits_of(options: ServiceOptions, info: EngineInfo) -> RequestLimits:
    """Return the limits of a request: the server's options, and the sizes of the engine."""
    return RequestLimits(
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
