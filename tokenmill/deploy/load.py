"""The load of a server, read from its metrics: what routing and autoscaling decide by."""

from __future__ import annotations

import msgspec

_NAMES = (
    "tgi_queue_size", "tgi_batch_current_size", "tokenmill_requests_in_flight", "tokenmill_kv_usage_ratio",
    "tokenmill_engine_up", "tgi_batch_max_total_tokens", "tokenmill_prompt_tokens_total",
    "tokenmill_cached_prompt_tokens_total", "tokenmill_prefill_tokens_total",
    "tokenmill_time_to_first_token_seconds_sum", "tokenmill_time_to_first_token_seconds_count",
)  # fmt: skip
_SHARE = 0.3  # of the newest interval in a moving mean
_PRIOR_RATE = 1000.0  # tokens of prompts per second, until some have been computed


class Load(msgspec.Struct, frozen=True):
    """State of a server. `waiting`, `running`: requests; `ttft_s`: predicted seconds until the first token of a request
    that arrives now; `capacity`: tokens that the cache holds; `kv_usage`: part of them in use; `up`: 1 if the engine
    answers."""

    waiting: float = 0.0
    running: float = 0.0
    ttft_s: float = 0.0
    kv_usage: float = 0.0
    capacity: float = 0.0
    up: float = 0.0


class LoadMeter:
    """Reads successive texts of `/metrics` of one server."""

    def __init__(self) -> None:
        self._before: dict[str, float] = {}
        self._before_at = 0.0
        self._rate = _PRIOR_RATE
        self._ttft_s = 0.0  # of requests that got their first token lately

    def read(self, text: str, now: float) -> Load:
        """Return the load at `now`, in monotonic seconds, when the server answered `text`.

        The predicted time to the first token is the larger of two: that of requests which got their first token since
        the last call, and the time that the prompts of waiting requests take at the rate of the last seconds.
        """
        values = values_of(text)
        increase = {name: values[name] - self._before.get(name, values[name]) for name in values}
        seconds = now - self._before_at
        self._before, self._before_at = values, now
        waiting = values.get("tgi_queue_size", 0.0)
        computed = increase.get("tokenmill_prefill_tokens_total", 0.0)
        if computed > 0 and waiting:  # at other times the rate is that of arrivals
            self._rate += _SHARE * (computed / seconds - self._rate)
        answers = increase.get("tokenmill_time_to_first_token_seconds_count", 0.0)
        if answers > 0:
            mean = increase["tokenmill_time_to_first_token_seconds_sum"] / answers
            self._ttft_s += _SHARE * (mean - self._ttft_s)
        elif not values.get("tokenmill_requests_in_flight"):
            self._ttft_s *= 1 - _SHARE
        queued_s = waiting * _mean_prompt(values) / self._rate
        return Load(
            waiting=waiting,
            running=values.get("tgi_batch_current_size", 0.0),
            ttft_s=max(self._ttft_s, queued_s),
            kv_usage=values.get("tokenmill_kv_usage_ratio", 0.0),
            capacity=values.get("tgi_batch_max_total_tokens", 0.0),
            up=values.get("tokenmill_engine_up", 0.0),
        )


def _mean_prompt(values: dict[str, float]) -> float:
    """Return the mean number of tokens of a prompt that had to be computed."""
    answers = values.get("tokenmill_time_to_first_token_seconds_count", 0.0)
    prompt = values.get("tokenmill_prompt_tokens_total", 0.0)
    cached = values.get("tokenmill_cached_prompt_tokens_total", 0.0)
    return max(prompt - cached, 0.0) / answers if answers else 0.0


def values_of(text: str) -> dict[str, float]:
    """Return the values of the metrics that this module reads, with samples of several labels added."""
    values: dict[str, float] = {}
    for line in text.splitlines():
        name, _, rest = line.partition(" ")
        name = name.partition("{")[0]
        if name in _NAMES:
            values[name] = values.get(name, 0.0) + float(rest.rpartition(" ")[2] or rest)
    return values
