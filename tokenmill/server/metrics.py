"""Every Prometheus metric: name, help, labels, buckets.

Names, labels and buckets of `tgi_*` are TGI's to the letter (no `_total` suffix). Values are kept in one memory-mapped
file per HTTP worker in the server's private folder, so any worker can answer a scrape for all of them, and a restarted
worker goes on counting where its predecessor stopped.
"""

from __future__ import annotations

import mmap
import operator
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, product
from pathlib import Path
from typing import Literal

import msgspec

Kind = Literal["counter", "gauge", "histogram", "summary"]
Scope = Literal["workers", "engine"]

_DURATIONS = tuple(accumulate([0.0001, *([1.5] * 35)], operator.mul))[
    1:
]  # by repeated multiplication, as TGI does, for the same digits
_LATENCIES = tuple(base * 10.0**e for e in range(-3, 2) for base in (1.0, 2.0, 3.0, 5.0, 7.5))
_BATCH_SIZES = tuple(float(i) for i in range(1, 1025))
_QUANTILES = ("0", "0.5", "0.9", "0.95", "0.99", "0.999", "1")
_METHOD = (("method", ("prefill", "decode")),)

ROUTE_LABELS = (
    "/", "/generate", "/generate_stream", "/tokenize", "/chat_tokenize", "/info", "/health", "/ping", "/metrics",
    "/v1/models", "/v1/chat/completions", "/v1/completions", "/invocations", "/vertex", "/docs",
    "/api-doc/openapi.json", "/v2", "other",
)  # fmt: skip
STATUSES = ("200", "204", "303", "307", "308", "400", "401", "404", "405", "408", "413", "415", "422", "424", "429",
            "431", "499", "500", "503", "other")  # fmt: skip


class Metric(msgspec.Struct, frozen=True, kw_only=True):
    """One metric.

    `labels`: name and all possible values, because cells are laid out beforehand. `buckets`: bounds, or
    "input"/"total": a hundred equal steps up to the server's limit. `scope` "workers": the values of the workers are
    added. "engine": every worker sees the same engine. For a gauge the value of the worker that heard from it last is
    used; for counts the largest, which never decreases when a worker is restarted. Values of several engines are added
    under TGI's names; metrics of our own have a line for each engine then, with its number as the label `engine`.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[tuple[str, tuple[str, ...]], ...] = ()
    buckets: tuple[float, ...] | Literal["input", "total"] = ()
    scope: Scope = "workers"

    @property
    def by_engine(self) -> bool:
        """True if the values of several engines are shown apart."""
        return self.scope == "engine" and self.name.startswith("tokenmill_")

    @property
    def num_bounds(self) -> int:
        """Number of upper bounds without +Inf."""
        return 100 if isinstance(self.buckets, str) else len(self.buckets)

    @property
    def width(self) -> int:
        """Cells of one combination of labels: a value; counts per bucket and +Inf, and the sum; count and sum."""
        return {"counter": 1, "gauge": 1, "summary": 2, "histogram": self.num_bounds + 2}[self.kind]

    def combinations(self) -> Iterator[tuple[str, ...]]:
        """Yield label values, in the order of their cells."""
        return product(*(values for _, values in self.labels))


def _metric(name: str, kind: Kind, text: str, **more: object) -> Metric:
    return msgspec.convert({"name": name, "kind": kind, "help": text, **more}, Metric)


def _duration(name: str, text: str, **more: object) -> Metric:
    return _metric(name, "histogram", text, buckets=_DURATIONS, **more)


_ERRORS = ("validation", "overloaded", "incomplete", "template", "dropped", "generation")

CATALOG: tuple[Metric, ...] = (
    _metric("tgi_request_count", "counter", "Requests that asked for a generation"),
    _metric("tgi_request_success", "counter", "Generations that ended well, one a prompt"),
    _metric("tgi_request_failure", "counter", "Requests that failed", labels=(("err", _ERRORS),)),
    _duration("tgi_request_duration", "Seconds from arrival to the last token"),
    _duration("tgi_request_validation_duration", "Seconds from arrival to the engine's queue"),
    _duration("tgi_request_queue_duration", "Seconds in the queue until the request joins the batch"),
    _duration("tgi_request_inference_duration", "Seconds from joining the batch to the last token"),
    _duration("tgi_request_mean_time_per_token_duration", "Seconds of inference per generated token"),
    _metric("tgi_request_generated_tokens", "histogram", "Generated tokens of a request", buckets="total"),
    _metric("tgi_request_input_length", "histogram", "Prompt tokens of a request", buckets="input"),
    _metric("tgi_request_max_new_tokens", "histogram", "Tokens that a request may generate", buckets="total"),
    _metric("tgi_request_skipped_tokens", "summary", "Accepted speculated tokens of a step of a request"),
    _metric("tgi_batch_inference_count", "counter", "Steps started", labels=_METHOD, scope="engine"),
    _metric("tgi_batch_inference_success", "counter", "Steps that returned", labels=_METHOD, scope="engine"),
    _metric("tgi_batch_inference_failure", "counter", "Steps that failed", labels=_METHOD, scope="engine"),
    _duration("tgi_batch_inference_duration", "Seconds of a step", labels=_METHOD, scope="engine"),
    _duration("tgi_batch_forward_duration", "Seconds of a step on the device", labels=_METHOD, scope="engine"),
    _duration("tgi_batch_decode_duration", "Seconds to turn a step's tokens into text and send it", labels=_METHOD),
    _duration("tgi_batch_filter_duration", "Seconds to drop finished requests (part of a step here: always 0)",
              labels=_METHOD, scope="engine"),
    _duration("tgi_batch_concat_duration", "Seconds to merge batches (there is nothing to merge here: always 0)",
              labels=(("method", ("decode",)),), scope="engine"),
    _metric("tgi_batch_concat", "counter", "Steps in which requests joined running ones",
            labels=(("reason", ("chunking", "backpressure", "wait_exceeded")),), scope="engine"),
    _metric("tgi_batch_next_size", "histogram", "Requests that join in a step", buckets=_BATCH_SIZES, scope="engine"),
    _metric("tgi_batch_current_size", "gauge", "Requests of the running batch", scope="engine"),
    _metric("tgi_batch_current_max_tokens", "gauge", "Cache tokens held by the running batch", scope="engine"),
    _metric("tgi_batch_max_total_tokens", "gauge", "Tokens that the cache holds", scope="engine"),
    _metric("tgi_queue_size", "gauge", "Requests waiting for the batch", scope="engine"),
    _metric("tokenmill_time_to_first_token_seconds", "histogram", "Seconds from arrival to the first token",
            buckets=_LATENCIES),
    _metric("tokenmill_inter_token_latency_seconds", "histogram", "Seconds between two tokens of a request",
            buckets=_LATENCIES),
    _metric("tokenmill_prompt_tokens_total", "counter", "Prompt tokens of admitted requests"),
    _metric("tokenmill_cached_prompt_tokens_total", "counter", "Prompt tokens that the prefix cache saved"),
    _metric("tokenmill_generated_tokens_total", "counter", "Tokens sent to clients"),
    _metric("tokenmill_requests_in_flight", "gauge", "Sequences between admission and their last token"),
    _metric("tokenmill_http_responses_total", "counter", "Answers; status 499: the client left before",
            labels=(("route", ROUTE_LABELS), ("status", STATUSES))),
    _metric("tokenmill_prefill_tokens_total", "counter", "Prompt tokens computed", scope="engine"),
    _metric("tokenmill_decode_tokens_total", "counter", "Tokens computed one at a time", scope="engine"),
    _metric("tokenmill_preemptions_total", "counter", "Sequences set back for lack of memory", scope="engine"),
    _metric("tokenmill_kv_blocks_used", "gauge", "Cache blocks held by running requests", scope="engine"),
    _metric("tokenmill_kv_blocks", "gauge", "Cache blocks", scope="engine"),
    _metric("tokenmill_kv_usage_ratio", "gauge", "Part of the cache held by running requests", scope="engine"),
    _metric("tokenmill_engine_up", "gauge", "1 while the engine answers", scope="engine"),
    _metric("tokenmill_running_requests", "gauge", "Requests of an engine's running batch", scope="engine"),
    _metric("tokenmill_waiting_requests", "gauge", "Requests that wait for an engine's batch", scope="engine"),
    _metric("tokenmill_resumed_requests_total", "counter", "Sequences that went on elsewhere after an engine stopped"),
)  # fmt: skip

_HEADER_CELLS = 3  # [0] layout size, [1] max_input_tokens, [2] max_total_tokens; then when each engine was last heard


class Metrics:
    """Metrics of one HTTP worker, and the text of all workers in the same folder.

    Values are float64 cells of a mapped file. One thread writes. A reader may see a histogram between two of its
    additions, which the next scrape corrects. The parameter `engine` of methods is the number of the engine that a
    value of scope "engine" is of; other metrics have no such parameter.
    """

    def __init__(self, folder: str, index: int, num_engines: int = 1) -> None:
        """Open the file of worker `index` in `folder`; an existing one is continued."""
        self._folder = Path(folder)
        self._num_engines = num_engines
        self._widths = {metric.name: metric.width for metric in CATALOG}
        self._offsets: dict[tuple[str, tuple[str, ...]], int] = {}  # of the first engine's cells; the others' follow
        size = _HEADER_CELLS + num_engines
        for metric in CATALOG:
            for values in metric.combinations():
                self._offsets[metric.name, values] = size
                size += metric.width * (num_engines if metric.scope == "engine" else 1)
        self._size = size
        path = self._folder / f"metrics-{index}.bin"
        path.touch(mode=0o600, exist_ok=True)
        with path.open("r+b") as file:
            file.truncate(size * 8)
            self._map = mmap.mmap(file.fileno(), size * 8)
        self._cells = memoryview(self._map).cast("d")
        self._cells[0] = float(size)
        self._info: Mapping[str, str] = {}
        self._bounds = {m.name: list(m.buckets) for m in CATALOG if not isinstance(m.buckets, str)}
        self.set("tokenmill_requests_in_flight", 0.0)
        self.set_limits(int(self._cells[1]) or 100, int(self._cells[2]) or 100)

    def set_limits(self, max_input_tokens: int, max_total_tokens: int) -> None:
        """Set the limits of requests, of which some buckets are steps."""
        self._cells[1], self._cells[2] = float(max_input_tokens), float(max_total_tokens)
        for metric in CATALOG:
            if isinstance(metric.buckets, str):
                top = max_input_tokens if metric.buckets == "input" else max_total_tokens
                self._bounds[metric.name] = [top / 100 * k for k in range(1, 101)]

    def set_info(self, **labels: str) -> None:
        """Set the labels of `tokenmill_model_info`, a gauge of 1."""
        self._info = labels

    def count_response(self, route: str, status: int) -> None:
        """Count an answer. A route or status without a cell of its own is counted as "other"."""
        known, text = route if route in ROUTE_LABELS else _family(route), str(status)
        self.add("tokenmill_http_responses_total", known, text if text in STATUSES else "other")

    def add(self, name: str, *values: str, amount: float = 1.0, engine: int = 0) -> None:
        """Add to a counter or gauge."""
        self._cells[self._cell(name, values, engine)] += amount

    def set(self, name: str, value: float, *, engine: int = 0) -> None:
        """Set a gauge without labels."""
        self._cells[self._cell(name, (), engine)] = value

    def observe(self, name: str, value: float, *values: str, engine: int = 0) -> None:
        """Add one value to a histogram."""
        bounds = self._bounds[name]
        offset = self._cell(name, values, engine)
        cells = self._cells
        cells[offset + bisect_left(bounds, value)] += 1.0
        cells[offset + len(bounds) + 1] += value

    def add_summary(self, name: str, count: int, total: float) -> None:
        """Add `count` values with the sum `total` to a summary."""
        offset = self._offsets[name, ()]
        self._cells[offset] += count
        self._cells[offset + 1] += total

    def heard(self, now: float, engine: int = 0) -> None:
        """Record that an engine was heard at `now` (monotonic seconds, the same clock in every worker)."""
        self._cells[_HEADER_CELLS + engine] = now

    def text(self) -> str:
        """Return the metrics of all workers in Prometheus' text format."""
        files = list(self._read_files())
        lines: list[str] = []
        for metric in CATALOG:
            lines.append(f"# HELP {metric.name} {metric.help}")
            lines.append(f"# TYPE {metric.name} {metric.kind}")
            for values in metric.combinations():
                if metric.scope == "workers":
                    lines.extend(self._lines(metric, values, _sums(self._columns(files, metric.name, values, 0))))
                    continue
                each = [self._of_engine(files, metric, values, engine) for engine in range(self._num_engines)]
                if metric.by_engine and len(each) > 1:
                    for engine, cells in enumerate(each):
                        lines.extend(self._lines(metric, values, cells, f'engine="{engine}"'))
                else:
                    lines.extend(self._lines(metric, values, _sums(each)))
        if self._info:
            lines += ["# HELP tokenmill_model_info What is served", "# TYPE tokenmill_model_info gauge"]
            lines.append(f"tokenmill_model_info{{{_pairs(self._info)}}} 1")
        return "\n".join(lines) + "\n"

    def _cell(self, name: str, values: tuple[str, ...], engine: int) -> int:
        offset = self._offsets[name, values]
        return offset + engine * self._widths[name] if engine else offset

    def _columns(
        self, files: list[memoryview[float]], name: str, values: tuple[str, ...], engine: int
    ) -> list[memoryview[float]]:
        """Return the cells of one combination of labels, by worker."""
        start = self._cell(name, values, engine)
        return [file[start : start + self._widths[name]] for file in files]

    def _of_engine(
        self, files: list[memoryview[float]], metric: Metric, values: tuple[str, ...], engine: int
    ) -> list[float]:
        """Return the cells of an engine, as the workers have seen it."""
        columns = self._columns(files, metric.name, values, engine)
        if metric.kind == "gauge":
            latest = max(range(len(files)), key=lambda worker: files[worker][_HEADER_CELLS + engine])
            return list(columns[latest])
        return [max(column) for column in zip(*columns, strict=True)]

    def _read_files(self) -> Iterator[memoryview[float]]:
        for path in sorted(self._folder.glob("metrics-*.bin")):
            data = path.read_bytes()
            if len(data) == self._size * 8:
                cells: memoryview[float] = memoryview(data).cast("d")
                yield cells

    def _lines(self, metric: Metric, values: tuple[str, ...], cells: list[float], more: str = "") -> Iterator[str]:
        pairs = [f'{name}="{value}"' for (name, _), value in zip(metric.labels, values, strict=True)]
        pairs += [more] if more else []
        labels = "{" + ",".join(pairs) + "}" if pairs else ""
        if metric.kind in ("counter", "gauge"):
            if len(metric.labels) < 2 or cells[0]:  # a grid of labels is mostly empty
                yield f"{metric.name}{labels} {_number(cells[0])}"
        elif metric.kind == "summary":
            for quantile in _QUANTILES if cells[0] else ():
                yield f'{metric.name}{{quantile="{quantile}"}} 0'
            yield f"{metric.name}_sum{labels} {_number(cells[1])}"
            yield f"{metric.name}_count{labels} {_number(cells[0])}"
        else:
            count = 0.0
            for bound, cell in zip([*self._bounds[metric.name], None], cells, strict=False):
                count += cell
                le = "+Inf" if bound is None else _number(bound)
                bucket = ",".join([*pairs, f'le="{le}"'])
                yield f"{metric.name}_bucket{{{bucket}}} {_number(count)}"
            yield f"{metric.name}_sum{labels} {_number(cells[-1])}"
            yield f"{metric.name}_count{labels} {_number(count)}"

    def close(self) -> None:
        """Unmap the file. No call may follow."""
        self._cells.release()
        self._map.close()


def _sums(columns: Iterable[Sequence[float]]) -> list[float]:
    """Return the sums over several files or engines, cell by cell."""
    return [float(sum(cells)) for cells in zip(*columns, strict=True)]


def _family(route: str) -> str:
    """Return the label of a longer route: `/v2` for `/v2/models/*`."""
    first = "/" + route.strip("/").partition("/")[0]
    return first if first in ROUTE_LABELS and first != "/" else "other"


def _pairs(labels: Mapping[str, str]) -> str:
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
