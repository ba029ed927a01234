"""EngineStatus: follows the connections and steps of the engines, and records them in the metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from tokenmill.server import digests
from tokenmill.server.metrics import Metrics
from tokenmill.server.options import ServiceOptions
from tokenmill.text.options import RequestLimits
from tokenmill.wire.messages import EngineInfo, Stats

_NO_STATS = Stats()


class Engine(msgspec.Struct, frozen=True):
    """A connected engine. `limits`: of each request; `digest`: see `digests.engine_digest`; `fingerprint`: the
    `system_fingerprint` of its answers. Of several engines: the first's, the smallest limits, and the sum of what their
    caches hold as `capacity`."""

    info: EngineInfo
    limits: RequestLimits
    name: str
    digest: str
    fingerprint: str
    capacity: int  # tokens


class EngineStatus:
    """Status of the engines as one worker sees it. For the event loop only.

    `phase`: "ready", or the part of the start that is being waited for. `engine`: the engines as far as they have been
    connected, also while they are lost. `became_ready`: set while an engine is connected.
    """

    def __init__(self, options: ServiceOptions, metrics: Metrics) -> None:
        self.phase = "starting"
        self.engine: Engine | None = None
        self.became_ready = asyncio.Event()
        self._options, self._metrics = options, metrics
        self._model_digest = ""
        self._infos: dict[int, EngineInfo] = {}  # by engine: its last
        self._connected: set[int] = set()
        self._stats: dict[int, Stats] = {}  # by engine: its last since it was connected

    def set_model(self, digest: str) -> None:
        """Set the model's digest, a part of the fingerprint. Call it before an engine is connected."""
        self._model_digest = digest

    def engine_of(self, index: int) -> Engine:
        """Return an engine by its number. It must have been connected once."""
        return self._engine([self._infos[index]])

    def connected(self, index: int, info: EngineInfo) -> None:
        """Record that a connection to an engine stands."""
        options, metrics = self._options, self._metrics
        self._infos[index] = info
        self._connected.add(index)
        self._stats.pop(index, None)
        engine = self.engine = self._engine([self._infos[index] for index in sorted(self._infos)])
        metrics.set_limits(engine.limits.max_input_tokens, engine.limits.max_total_tokens)
        metrics.set("tgi_batch_max_total_tokens", info.capacity, engine=index)
        metrics.set("tokenmill_kv_blocks", info.num_blocks, engine=index)
        metrics.set("tokenmill_engine_up", 1.0, engine=index)
        metrics.set_info(
            version=options.version, model=info.model_id, revision=info.revision, dtype=info.dtype,
            quantize=info.quantize, backend=info.backend, device=info.device, shards=str(info.num_shard),
        )  # fmt: skip
        self.phase = "ready"
        self.became_ready.set()

    def lost(self, index: int, num_requests: int) -> None:
        """Record that a connection is gone, and that `num_requests` were running on it."""
        stats = self._stats.get(index)
        if num_requests and stats is not None:
            method = "prefill" if stats.prefill_rows else "decode"
            self._metrics.add("tgi_batch_inference_failure", method, engine=index)
        for name in ("tokenmill_engine_up", "tgi_batch_current_size", "tgi_queue_size", "tgi_batch_current_max_tokens",
                     "tokenmill_running_requests", "tokenmill_waiting_requests", "tokenmill_kv_blocks_used",
                     "tokenmill_kv_usage_ratio"):  # fmt: skip
            self._metrics.set(name, 0.0, engine=index)
        self._connected.discard(index)
        if not self._connected:
            self.phase = "the engine is restarting"
            self.became_ready.clear()

    def resumed(self) -> None:
        """Record that a request of a lost engine goes on on another one."""
        self._metrics.add("tokenmill_resumed_requests_total")

    def stepped(self, index: int, stats: Stats, num_outputs: int, handling_s: float) -> None:
        """Record an engine's step: statistics, number of outputs, and the seconds that handling them took."""
        before, self._stats[index] = self._stats.get(index), stats
        if before is None:  # the earlier steps of a running engine were counted by an earlier worker
            before = _NO_STATS if stats.steps <= 1 else stats
        metrics = self._metrics
        metrics.heard(asyncio.get_running_loop().time(), index)
        info = self._infos.get(index)
        used = stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0
        metrics.set("tgi_queue_size", stats.waiting, engine=index)
        metrics.set("tgi_batch_current_size", stats.running, engine=index)
        metrics.set("tgi_batch_current_max_tokens", round(used * info.capacity) if info else 0, engine=index)
        metrics.set("tokenmill_waiting_requests", stats.waiting, engine=index)
        metrics.set("tokenmill_running_requests", stats.running, engine=index)
        metrics.set("tokenmill_kv_blocks_used", stats.blocks_used, engine=index)
        metrics.set("tokenmill_kv_usage_ratio", used, engine=index)
        if failures := stats.retracted - before.retracted:
            method = "prefill" if before.prefill_rows else "decode"
            metrics.add("tgi_batch_inference_failure", method, amount=failures, engine=index)
        if stats.steps > before.steps:
            self._count_steps(index, before, stats, num_outputs, handling_s)

    def _count_steps(self, index: int, before: Stats, stats: Stats, num_outputs: int, handling_s: float) -> None:
        """Record the steps since `before`. TGI has metrics by the kind of batch: a prompt's, or a decoding one."""
        metrics, num_steps = self._metrics, stats.steps - before.steps
        method = "prefill" if stats.prefill_rows or stats.admitted else "decode"  # a prompt may be one token, or cached
        metrics.add("tgi_batch_inference_count", method, amount=num_steps, engine=index)
        metrics.add("tgi_batch_inference_success", method, amount=num_steps, engine=index)
        metrics.observe("tgi_batch_inference_duration", stats.step_s, method, engine=index)
        metrics.observe("tgi_batch_forward_duration", stats.step_s, method, engine=index)
        metrics.observe("tgi_batch_filter_duration", 0.0, method, engine=index)
        if num_outputs:
            metrics.observe("tgi_batch_decode_duration", handling_s, method)
        if stats.admitted:
            metrics.observe("tgi_batch_next_size", stats.admitted, engine=index)
            if stats.batch_size > stats.admitted:
                metrics.add("tgi_batch_concat", "chunking", engine=index)
                metrics.observe("tgi_batch_concat_duration", 0.0, "decode", engine=index)
        for name, amount in (
            ("tokenmill_prefill_tokens_total", stats.prefill_tokens - before.prefill_tokens),
            ("tokenmill_decode_tokens_total", stats.decode_tokens - before.decode_tokens),
            ("tokenmill_preemptions_total", stats.preemptions - before.preemptions),
        ):
            metrics.add(name, amount=amount, engine=index)

    def _engine(self, infos: list[EngineInfo]) -> Engine:
        info, options = infos[0], self._options
        digest = digests.engine_digest(info, options.version, options.numerics)
        return Engine(
            info,
            limits_of(options, infos),
            " ".join(filter(None, (info.backend, info.device, info.dtype, info.quantize))),
            digest,
            digests.fingerprint(options.version, options.docker_label, self._model_digest, digest),
            sum(one.capacity for one in infos),
        )


def limits_of(options: ServiceOptions, infos: Sequence[EngineInfo]) -> RequestLimits:
    """Return the limits of a request: the server's options, and the sizes of the smallest of its engines."""
    return RequestLimits(
        max_input_tokens=min(info.max_input_tokens for info in infos),
        max_total_tokens=min(info.max_total_tokens for info in infos),
        max_stop_sequences=options.max_stop_sequences,
        max_best_of=options.max_best_of,
        max_top_n_tokens=options.max_top_n_tokens,
        vocab_size=infos[0].vocab_size,
        watermark_gamma=options.watermark_gamma,
        watermark_delta=options.watermark_delta,
        grammars=options.grammars,
    )
