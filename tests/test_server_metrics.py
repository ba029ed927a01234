"""Metrics: names and buckets as TGI's, several workers in one text, counts that outlive a worker."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support_ports import unused_port
from support_server import Server, byte_model, eventually

from tokenmill.server.metrics import CATALOG, ROUTE_LABELS, Metrics
from tokenmill.server.routes import table

TGI = """tgi_request_count tgi_request_success tgi_request_failure tgi_request_duration tgi_request_validation_duration
tgi_request_queue_duration tgi_request_inference_duration tgi_request_mean_time_per_token_duration
tgi_request_generated_tokens tgi_request_input_length tgi_request_max_new_tokens tgi_request_skipped_tokens
tgi_batch_inference_count tgi_batch_inference_success tgi_batch_inference_failure tgi_batch_inference_duration
tgi_batch_forward_duration tgi_batch_decode_duration tgi_batch_filter_duration tgi_batch_concat_duration
tgi_batch_concat tgi_batch_next_size tgi_batch_current_size tgi_batch_current_max_tokens tgi_queue_size""".split()


def samples(text: str) -> dict[str, float]:
    """Return every line as `name|label=value`. (Prometheus' own parser would add `_total` to counters.)"""
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            found[name.replace("{", "|").replace("}", "").replace('"', "").replace(",", "|")] = float(value)
    return found


def test_prometheus_understands_the_text(tmp_path: Path) -> None:
    families = {family.name: family for family in text_string_to_metric_families(Metrics(str(tmp_path), 0).text())}
    assert families["tgi_request_duration"].type == "histogram"
    assert families["tgi_queue_size"].type == "gauge"
    assert len(families) == len(CATALOG)


def test_every_metric_of_tgi_is_there_under_its_name(tmp_path: Path) -> None:
    text = Metrics(str(tmp_path), 0).text()
    for name in TGI:
        assert f"# TYPE {name} " in text
    assert len({metric.name for metric in CATALOG}) == len(CATALOG)


def test_buckets_are_tgis(tmp_path: Path) -> None:
    metrics = Metrics(str(tmp_path), 0)
    metrics.set_limits(1000, 2000)
    metrics.observe("tgi_request_duration", 0.0002)
    metrics.observe("tgi_request_input_length", 10)
    metrics.observe("tgi_request_generated_tokens", 21)
    found = samples(metrics.text())
    bounds = [float(key.split("le=")[1]) for key in found if key.startswith("tgi_request_duration_bucket")]
    assert bounds[:-1] == pytest.approx([0.0001 * 1.5**i for i in range(1, 36)])
    assert found["tgi_request_duration_bucket|le=0.00015000000000000001"] == 0
    assert found["tgi_request_duration_bucket|le=0.00022500000000000002"] == 1
    assert found["tgi_request_input_length_bucket|le=10"] == 1
    assert found["tgi_request_generated_tokens_bucket|le=20"] == 0
    assert found["tgi_request_generated_tokens_bucket|le=40"] == 1
    assert len([key for key in found if key.startswith("tgi_batch_next_size_bucket")]) == 1025


def test_bounds_have_the_digits_of_tgis(tmp_path: Path) -> None:
    # TGI multiplies on from 0.0001 by 1.5, and multiplies a hundredth of the limit by 1 … 100.
    metrics = Metrics(str(tmp_path), 0)
    metrics.set_limits(1023, 2048)
    found = samples(metrics.text())
    bound = 0.0001
    for _ in range(35):
        bound *= 1.5
        assert f"tgi_request_queue_duration_bucket|le={bound!r}" in found
    assert f"tgi_request_input_length_bucket|le={1023 / 100 * 7!r}" in found
    assert "tgi_request_max_new_tokens_bucket|le=2048" in found


def test_each_route_is_counted_under_a_name_of_its_own_or_its_familys(tmp_path: Path) -> None:
    metrics = Metrics(str(tmp_path), 0)
    for route in table.ROUTES:
        metrics.count_response(route.path.removesuffix("/*"), 200)
    metrics.count_response("/a/path/of/vertex", 200)
    metrics.count_response("/generate", 599)
    found = samples(metrics.text())
    name = "tokenmill_http_responses_total|route="
    assert found[f"{name}other|status=200"] == 1
    assert found[f"{name}/generate|status=other"] == 1
    families = {route.path for route in table.ROUTES if f"{name}{route.path}|status=200" in found}
    assert families == set(ROUTE_LABELS) - {"other"} & {route.path for route in table.ROUTES}
    assert found[f"{name}/v2|status=200"] == sum(route.path.startswith("/v2") for route in table.ROUTES)


def test_what_is_served_is_a_metric_with_escaped_words(tmp_path: Path) -> None:
    metrics = Metrics(str(tmp_path), 0)
    assert "tokenmill_model_info" not in metrics.text()
    metrics.set_info(model='a "b"\\c', device="cpu")
    families = {family.name: family for family in text_string_to_metric_families(metrics.text())}
    (sample,) = families["tokenmill_model_info"].samples
    assert sample.labels == {"model": 'a "b"\\c', "device": "cpu"}
    assert sample.value == 1


def test_a_histogram_counts_up_and_adds_its_values(tmp_path: Path, rng) -> None:  # type: ignore[no-untyped-def]
    metrics = Metrics(str(tmp_path), 0)
    values = rng.exponential(0.5, 500)
    for value in values:
        metrics.observe("tokenmill_time_to_first_token_seconds", float(value))
    name = "tokenmill_time_to_first_token_seconds"
    found = samples(metrics.text())
    for key, count in found.items():
        if key.startswith(f"{name}_bucket"):
            assert count == (values <= float(key.split("le=")[1])).sum()
    assert found[f"{name}_count"] == 500
    assert found[f"{name}_sum"] == pytest.approx(values.sum())


def test_workers_add_up_and_the_engine_is_counted_once(tmp_path: Path) -> None:
    first, second = Metrics(str(tmp_path), 0), Metrics(str(tmp_path), 1)
    for metrics, amount in ((first, 2), (second, 3)):
        metrics.add("tgi_request_success", amount=amount)
        metrics.add("tgi_request_failure", "dropped", amount=amount)
        metrics.add("tgi_batch_inference_count", "decode", amount=10 * amount)
        metrics.set("tgi_queue_size", amount)
    second.heard(1.0)
    first.heard(2.0)
    for metrics in (first, second):
        found = samples(metrics.text())
        assert found["tgi_request_success"] == 5
        assert found["tgi_request_failure|err=dropped"] == 5
        assert found["tgi_batch_inference_count|method=decode"] == 30  # the largest count
        assert found["tgi_queue_size"] == 2  # the latest value


def test_a_restarted_worker_goes_on_counting_but_holds_no_requests(tmp_path: Path) -> None:
    before = Metrics(str(tmp_path), 0)
    before.add("tgi_request_success")
    before.set("tokenmill_requests_in_flight", 7)
    before.close()
    after = Metrics(str(tmp_path), 0)
    after.add("tgi_request_success")
    found = samples(after.text())
    assert found["tgi_request_success"] == 2
    assert found["tokenmill_requests_in_flight"] == 0


def test_files_of_another_layout_are_left_out(tmp_path: Path) -> None:
    metrics = Metrics(str(tmp_path), 0)
    (tmp_path / "metrics-1.bin").write_bytes(b"\0" * 80)
    metrics.add("tgi_request_success")
    assert samples(metrics.text())["tgi_request_success"] == 1


def test_the_dashboard_asks_for_metrics_and_labels_that_there_are() -> None:
    dashboard = json.loads((Path(__file__).resolve().parent.parent / "docs" / "grafana.json").read_text())
    known = {metric.name: metric for metric in CATALOG}
    shown = set()
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            for name, labels in re.findall(r"((?:tgi|tokenmill)_\w+)\{([^}]*)\}", target["expr"]):
                metric = known[name if name in known else re.sub("_(bucket|sum|count)$", "", name)]
                shown.add(metric.name)
                assert name.endswith("_bucket") == (metric.kind == "histogram")
                asked = dict(re.findall(r'(\w+)=~?"([^"]*)"', labels))
                assert asked.pop("instance") == "$instance"
                assert all(value in dict(metric.labels)[label] for label, value in asked.items())
            for label in re.findall(r"by \((\w+)\)", target["expr"]):
                assert label == "le" or label in dict(metric.labels)
    assert len(shown) > 20


# Metrics of a real server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = unused_port()
    limits = ("--max-input-tokens", "99", "--max-total-tokens", "200")
    running = Server(byte_model(tmp_path_factory.mktemp("model")), port, "--mock-step-ms", "2", *limits)
    yield running
    running.stop()


class Counts:
    """Increase of a server's metrics since this object was made."""

    def __init__(self, server: Server) -> None:
        self.server, self.before = server, self.now(server)

    @staticmethod
    def now(server: Server) -> dict[str, float]:
        return samples(httpx.get(server.url + "/metrics", timeout=5).text)

    def grown(self) -> dict[str, float]:
        changes = {name: value - self.before.get(name, 0) for name, value in self.now(self.server).items()}
        return {name: change for name, change in changes.items() if change}


CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
ASKED = [
    ("/generate", {"inputs": "hi", "parameters": {"max_new_tokens": 4}}, 1, 4),
    ("/generate", {"inputs": "hi", "parameters": {"max_new_tokens": 4, "best_of": 2, "do_sample": True}}, 1, 4),
    ("/", {"inputs": "hi", "parameters": {"max_new_tokens": 4}}, 1, 4),
    ("/v1/chat/completions", CHAT, 1, 3),
    ("/v1/chat/completions", CHAT | {"n": 3}, 1, 3),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 3}, 2, 6),
]


@pytest.mark.parametrize("path, body, prompts, tokens", ASKED)
def test_a_request_counts_once_and_each_prompt_as_a_success(
    server: Server, path: str, body: dict[str, object], prompts: int, tokens: int
) -> None:
    counts = Counts(server)
    assert server.post(path, body).status_code == 200
    grown = counts.grown()
    assert grown["tgi_request_count"] == 1
    assert grown["tgi_request_success"] == prompts
    for name in ("duration", "validation_duration", "queue_duration", "inference_duration",
                 "mean_time_per_token_duration", "generated_tokens", "input_length", "max_new_tokens"):  # fmt: skip
        assert grown[f"tgi_request_{name}_count"] == prompts
    assert grown["tgi_request_generated_tokens_sum"] == tokens
    assert grown["tgi_request_skipped_tokens_count"] == tokens
    assert "tgi_request_skipped_tokens_sum" not in grown
    assert not any(name.startswith("tgi_request_failure") for name in grown)
    parts = sum(grown[f"tgi_request_{part}_duration_sum"] for part in ("validation", "queue", "inference"))
    assert parts == pytest.approx(grown["tgi_request_duration_sum"], abs=1e-6)
    assert grown[f"tokenmill_http_responses_total|route={path}|status=200"] == 1
    assert grown["tgi_batch_inference_count|method=prefill"] >= 1
    assert grown["tgi_batch_inference_count|method=decode"] >= 2
    assert grown["tgi_batch_next_size_sum"] >= prompts


@pytest.mark.parametrize("path, body, label", [
    ("/generate", {"inputs": ""}, "validation"),
    ("/generate", {"inputs": "hi", "parameters": {"max_new_tokens": 500}}, "validation"),
    ("/v1/completions", {"prompt": "a", "suffix": "b"}, "validation"),
    ("/v1/completions", {"prompt": ["a"] * 5}, "validation"),
    ("/generate", {"inputs": 7}, None),
])  # fmt: skip
def test_a_failure_counts_under_its_kind_and_a_body_of_the_wrong_shape_not_at_all(
    server: Server, path: str, body: dict[str, object], label: str | None
) -> None:
    counts = Counts(server)
    assert server.post(path, body).status_code in (400, 422)
    failures = {name: value for name, value in counts.grown().items() if name.startswith("tgi_request_failure")}
    assert failures == ({f"tgi_request_failure|err={label}": 1} if label else {})


def test_a_client_that_leaves_counts_as_dropped(server: Server) -> None:
    counts = Counts(server)
    body = {"inputs": "hi", "parameters": {"max_new_tokens": 90}}
    with httpx.stream("POST", server.url + "/generate_stream", json=body, timeout=5) as response:
        next(response.iter_lines())
    eventually(lambda: counts.grown().get("tgi_request_failure|err=dropped") == 1)
    assert "tgi_request_success" not in counts.grown()


def test_gauges_return_to_zero_when_nothing_runs(server: Server) -> None:
    gauges = [f"tgi_{name}" for name in ("batch_current_size", "batch_current_max_tokens", "queue_size")]
    gauges.append("tokenmill_requests_in_flight")
    eventually(lambda: [Counts.now(server)[name] for name in gauges] == [0, 0, 0, 0])
    found = Counts.now(server)
    assert found["tgi_batch_max_total_tokens"] > 0
    assert "tgi_request_input_length_bucket|le=0.99" in found
    assert "tgi_request_generated_tokens_bucket|le=200" in found


def test_an_engine_that_dies_fails_a_step_and_the_requests_that_ran(server: Server) -> None:
    counts = Counts(server)
    body = {"inputs": "hi", "parameters": {"max_new_tokens": 90}}
    with httpx.stream("POST", server.url + "/generate_stream", json=body, timeout=5) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(server.children()["runtime"], signal.SIGKILL)
        assert any('"error_type":"generation"' in line for line in lines)
    grown = counts.grown()
    assert sum(grown.get(f"tgi_batch_inference_failure|method={method}", 0) for method in ("prefill", "decode")) == 1
    assert grown["tgi_request_failure|err=generation"] == 1
    assert grown["tokenmill_engine_up"] == -1
