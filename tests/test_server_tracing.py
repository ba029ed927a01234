"""Traces as received by a collector over OTLP from a real server; messages if the packages are missing."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import httpx
import pytest
from support_ports import unused_port
from support_server import Server, byte_model, eventually

from tokenmill import extras
from tokenmill.errors import MissingPackage
from tokenmill.server.access import duration, handler_name

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """Collector that keeps its spans by name, in the order of arrival."""

    def __init__(self) -> None:
        import grpc
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as services

        collector = self
        self.spans: list[Any] = []
        self.services: set[str] = set()

        class Servicer(services.TraceServiceServicer):
            def Export(self, request: Any, context: Any) -> Any:
                for resource in request.resource_spans:
                    collector.services.add(attributes(resource.resource)["service.name"])
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                return messages.ExportTraceServiceResponse()

        self.server = grpc.server(futures.ThreadPoolExecutor(1))
        services.add_TraceServiceServicer_to_server(Servicer(), self.server)
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()

    def trace(self, name: str) -> dict[str, Any]:
        """Return the last trace whose outermost span has this name: its spans by name."""
        root = [span for span in self.spans if span.name == name][-1]
        return {span.name: span for span in self.spans if span.trace_id == root.trace_id}


def attributes(thing: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in thing.attributes}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    if importlib.util.find_spec("opentelemetry") is None:
        pytest.skip("OpenTelemetry's packages are not installed")
    made = Collector()
    yield made
    made.server.stop(None)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> tuple[Collector, str]:
    """Return a collector with the traces of some requests, and the log of their server."""
    port = unused_port()
    model = byte_model(tmp_path_factory.mktemp("model"))
    endpoint = f"http://127.0.0.1:{collector.port}"
    server = Server(model, port, "--otlp-endpoint", endpoint, "--otlp-service-name", "mill", "--json-output")
    try:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-00", "x-request-id": "it-is-me"}
        parameters = {"max_new_tokens": 4, "temperature": 0.5, "seed": 9, "stop": ["secret"]}
        server.post("/generate", {"inputs": "hello", "parameters": parameters}, headers=headers)
        server.events("/generate_stream", {"inputs": "hello", "parameters": {"max_new_tokens": 3}})
        server.post("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2})
        server.post("/generate", {"inputs": ""}, headers={"traceparent": f"00-{'1' * 32}-{PARENT}-01"})
        eventually(lambda: len([s for s in collector.spans if s.name.startswith("POST")]) >= 4)
    finally:
        log = server.stop()
    return collector, log


def test_a_request_is_a_trace_whose_parent_is_the_callers_span(traced: tuple[Collector, str]) -> None:
    collector, _ = traced
    spans = {span.name: span for span in collector.spans if span.trace_id.hex() == TRACE}
    assert set(spans) == {"POST /generate", "generate", "validate", "queued", "infer", "prefill", "decode"}
    parents = {"POST /generate": PARENT, "generate": "POST /generate", "validate": "generate", "queued": "generate",
               "infer": "generate", "prefill": "infer", "decode": "infer"}  # fmt: skip
    for name, parent in parents.items():
        assert spans[name].parent_span_id.hex() == (PARENT if parent == PARENT else spans[parent].span_id.hex())
    assert collector.services == {"mill"}


def test_spans_have_tgis_fields_and_opentelemetrys_names(traced: tuple[Collector, str]) -> None:
    spans = {span.name: span for span in traced[0].spans if span.trace_id.hex() == TRACE}
    http = attributes(spans["POST /generate"])
    assert http["http.request.method"] == http["http.method"] == "POST"
    assert (http["http.route"], http["http.response.status_code"], http["request_id"]) == ("/generate", 200, "it-is-me")
    assert spans["POST /generate"].kind == 2  # SPAN_KIND_SERVER
    handler = attributes(spans["generate"])
    assert {"parameters", "total_time", "validation_time", "queue_time", "inference_time", "time_per_token", "seed"} < (
        set(handler)
    )
    assert handler["seed"] == "Some(9)"
    assert handler["parameters"] == (
        "GenerateParameters { temperature: Some(0.5), repetition_penalty: None, frequency_penalty: None, top_k: None, "
        'top_p: None, typical_p: None, do_sample: true, max_new_tokens: Some(4), stop: ["***"], watermark: false, '
        "decoder_input_details: false, seed: Some(9), top_n_tokens: None }"
    )
    assert "secret" not in str(traced[0].spans)
    assert attributes(spans["infer"])["gen_ai.usage.output_tokens"] == 4


def test_spans_follow_each_other_in_time_within_their_parents(traced: tuple[Collector, str]) -> None:
    spans = {span.name: span for span in traced[0].spans if span.trace_id.hex() == TRACE}
    outer, handler, infer = spans["POST /generate"], spans["generate"], spans["infer"]
    assert outer.start_time_unix_nano == handler.start_time_unix_nano == spans["validate"].start_time_unix_nano
    assert spans["validate"].end_time_unix_nano == spans["queued"].start_time_unix_nano
    assert spans["queued"].end_time_unix_nano == infer.start_time_unix_nano == spans["prefill"].start_time_unix_nano
    assert spans["prefill"].end_time_unix_nano == spans["decode"].start_time_unix_nano
    assert spans["decode"].end_time_unix_nano == infer.end_time_unix_nano <= outer.end_time_unix_nano
    decode_s = (spans["decode"].end_time_unix_nano - spans["decode"].start_time_unix_nano) / 1e9
    assert 0.02 < decode_s < 2  # three of the mock engine's steps of 10 ms


def test_streams_prompts_and_failures_are_traced_too(traced: tuple[Collector, str]) -> None:
    collector, _ = traced
    assert {"generate_stream", "infer"} < set(collector.trace("POST /generate_stream"))
    completions = collector.trace("POST /v1/completions")["POST /v1/completions"]
    assert [s.name for s in collector.spans if s.trace_id == completions.trace_id].count("infer") == 2
    failed = {span.name: span for span in collector.spans if span.trace_id.hex() == "1" * 32}
    assert set(failed) == {"POST /generate", "generate"}
    assert attributes(failed["POST /generate"])["http.response.status_code"] == 422


def test_the_success_lines_of_the_log_have_the_same_fields(traced: tuple[Collector, str]) -> None:
    lines = [json.loads(line) for line in traced[1].splitlines() if '"message":"Success"' in line]
    assert [line["span"]["name"] for line in lines] == ["generate", "generate_stream", "completions", "completions"]
    first = lines[0]["span"]
    spans = {span.name: span for span in traced[0].spans if span.trace_id.hex() == TRACE}
    assert first.pop("request_id") == "it-is-me"
    assert first.pop("name") == "generate"
    assert first.items() == {k: v for k, v in attributes(spans["generate"]).items() if not k.startswith("http")}.items()
    assert "secret" not in traced[1]


def test_a_refused_request_is_a_line_with_status_and_id_and_without_its_words(traced: tuple[Collector, str]) -> None:
    lines = [json.loads(line) for line in traced[1].splitlines() if '"message":"Refused"' in line]
    assert [line["span"]["status"] for line in lines] == [422]
    assert lines[0]["span"].keys() == {"name", "status", "request_id"}


def test_without_the_packages_the_start_is_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"pip install 'tokenmill\[otel\]'"):
        extras.need_opentelemetry()


@pytest.mark.parametrize("seconds, text", [
    (1.5, "1.5s"), (12.0, "12s"), (0.0456, "45.6ms"), (0.000_012_3, "12.3µs"), (8e-8, "80ns"), (0.0, "0ns"),
    (1.234567891, "1.234567891s"), (0.001, "1ms"), (-1.0, "0ns"), (100.0, "100s"),
])  # fmt: skip
def test_durations_are_written_as_rust_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("method, route, name", [
    ("POST", "/", "compat_generate"), ("GET", "/", "health"), ("POST", "/generate_stream", "generate_stream"),
    ("POST", "/v1/chat/completions", "chat_completions"), ("POST", "/v1/completions", "completions"),
    ("POST", "/vertex", "vertex_compatibility"), ("POST", "/invocations", "sagemaker_compatibility"),
    ("GET", "/info", "get_model_info"), ("GET", "/v1/models", "openai_get_model_info"), ("GET", "/health", "health"),
])  # fmt: skip
def test_handlers_have_tgis_names(method: str, route: str, name: str) -> None:
    assert handler_name(method, route) == name


def test_nothing_is_imported_where_no_traces_are_wanted(tmp_path: Path, free_port: int) -> None:
    server = Server(byte_model(tmp_path), free_port)
    try:
        assert httpx.get(server.url + "/health", timeout=5).status_code == 200
        maps = Path(f"/proc/{server.children()['server']}/maps").read_text()
    finally:
        server.stop()
    assert "grpc" not in maps
