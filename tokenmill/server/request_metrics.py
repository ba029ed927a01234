"""Metrics of requests: records the events of a request in the metrics that TGI and this server have for them."""

from __future__ import annotations

from tokenmill.errors import RequestError
from tokenmill.server import failures
from tokenmill.server.generation import Generation
from tokenmill.server.metrics import Metrics
from tokenmill.text.prepare import Prepared


class RequestMetrics:
    """Recorder of one worker's requests."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def prepared(self, prepared: Prepared) -> None:
        """Record a prompt that passed validation."""
        self._metrics.observe("tgi_request_input_length", prepared.num_prompt)
        self._metrics.observe("tgi_request_max_new_tokens", prepared.stopping.max_new_tokens)

    def gap(self, seconds: float) -> None:
        """Record the time between two tokens of a sequence."""
        self._metrics.observe("tokenmill_inter_token_latency_seconds", seconds)

    def sequence(self, generation: Generation) -> None:
        """Record a complete sequence."""
        metrics, times = self._metrics, generation.timings
        metrics.observe("tokenmill_time_to_first_token_seconds", times.first - times.arrived)
        metrics.add("tokenmill_prompt_tokens_total", amount=generation.prepared.num_prompt)
        metrics.add("tokenmill_cached_prompt_tokens_total", amount=generation.num_cached)
        metrics.add("tokenmill_generated_tokens_total", amount=generation.num_generated)

    def success(self, generation: Generation) -> None:
        """Record an answered prompt. Call it for the first of several copies (`best_of`, `n`) only, as TGI does."""
        metrics, times, count = self._metrics, generation.timings, generation.num_generated
        metrics.add("tgi_request_success")
        metrics.observe("tgi_request_duration", times.last - times.arrived)
        metrics.observe("tgi_request_validation_duration", times.submitted - times.arrived)
        metrics.observe("tgi_request_queue_duration", times.admitted - times.submitted)
        metrics.observe("tgi_request_inference_duration", times.last - times.admitted)
        metrics.observe("tgi_request_mean_time_per_token_duration", (times.last - times.admitted) / max(count, 1))
        metrics.observe("tgi_request_generated_tokens", count)
        metrics.add_summary("tgi_request_skipped_tokens", count, 0.0)

    def failure(self, error: RequestError) -> None:
        """Record a failed request, if TGI counts errors of this kind."""
        label = failures.failure_label(error)
        if label is not None:
            self._metrics.add("tgi_request_failure", label)

    def dropped(self) -> None:
        """Record a request whose client left before the end."""
        self._metrics.add("tgi_request_failure", "dropped")
