"""Metrics: names and buckets as TGI's, several workers in one text, counts that outlive a worker."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tokenmill.server import app
from tokenmill.server.metrics import CATALOG, ROUTES, Metrics

TGI = """tgi_request_count tgi_request_success tgi_request_failure tgi_request_duration tgi_request_validation_duration
tgi_request_queue_duration tgi_request_inference_duration tgi_request_mean_time_per_token_duration
tgi_request_generated_tokens tgi_request_input_length tgi_request_max_new_tokens tgi_request_skipped_tokens
tgi_batch_inference_count tgi_batch_inference_success tgi_batch_inference_failure tgi_batch_inference_duration
tgi_batch_forward_duration tgi_batch_decode_duration tgi_batch_filter_duration tgi_batch_concat_duration
tgi_batch_concat tgi_batch_next_size tgi_batch_current_size tgi_batch_current_max_tokens tgi_queue_size""".split()


def samples(text: str) -> dict[str, float]:
    """Every line as `name|label=value`. (Prometheus' own parser would add `_total` to counters.)"""
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
    bound, i = 0.0001, 0
    for i in range(35):
        bound *= 1.5
        assert f"tgi_request_queue_duration_bucket|le={bound!r}" in found
    assert i == 34
    assert f"tgi_request_input_length_bucket|le={1023 / 100 * 7!r}" in found
    assert "tgi_request_max_new_tokens_bucket|le=2048" in found


def test_each_route_is_counted_under_a_name_of_its_own_or_its_familys(tmp_path: Path) -> None:
    metrics = Metrics(str(tmp_path), 0)
    for route in app.ROUTES:
        metrics.count_response(route.path.removesuffix("/*"), 200)
    metrics.count_response("/a/path/of/vertex", 200)
    metrics.count_response("/generate", 599)
    found = samples(metrics.text())
    name = "tokenmill_http_responses_total|route="
    assert found[f"{name}other|status=200"] == 1
    assert found[f"{name}/generate|status=other"] == 1
    families = {route.path for route in app.ROUTES if f"{name}{route.path}|status=200" in found}
    assert families == set(ROUTES) - {"other"} & {route.path for route in app.ROUTES}
    assert found[f"{name}/v2|status=200"] == sum(route.path.startswith("/v2") for route in app.ROUTES)


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
        assert found["tgi_batch_inference_count|method=decode"] == 30  # who counted most
        assert found["tgi_queue_size"] == 2  # who heard last


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
