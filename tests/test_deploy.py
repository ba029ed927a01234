"""Descriptions of deployments, selection of models, merged answers, load and scaling: without Ray."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace
from typing import Any

import pytest

from tokenmill.deploy import command, merged
from tokenmill.deploy.load import _NAMES as READ_METRICS
from tokenmill.deploy.load import Load, LoadMeter, values_of
from tokenmill.deploy.plan import Model, Scaling, plan_of, resources_of, words_and_environment
from tokenmill.deploy.prompts import prompt_and_limit
from tokenmill.deploy.scaling import Policy, replicas_wanted
from tokenmill.deploy.selection import Served, select
from tokenmill.deploy.server_process import HAS_ENDED
from tokenmill.errors import ArgumentError
from tokenmill.placement.prompt import prompt_of_text
from tokenmill.server.failures import NotFound
from tokenmill.server.metrics import CATALOG, Metrics

BOTH = (Served("small", "org/small-it"), Served("large", "org/large"))


# The description


@pytest.mark.parametrize(
    "args,words",
    [
        ({}, "models"),
        ({"models": []}, "`models` is empty"),
        ({"models": [{"optoins": {}}]}, "optoins"),
        ({"models": [{"options": {"num_shards": 2}}]}, "did you mean 'num_shard'"),
        ({"models": [{"options": {"num_shard": "two"}}]}, "'two' is not a whole number"),
        ({"models": [{"options": {"port": 80}}]}, "--port of `tokenmill deploy`"),
        ({"models": [{"options": {"max_input_tokens": 9, "max_total_tokens": 9}}]}, "must be <"),
        ({"models": [{"name": "v1"}]}, "another `name`"),
        ({"models": [{"name": "a/b"}]}, "another `name`"),
        ({"models": [{"name": 'a"b'}]}, "another `name`"),
        ({"models": [{"name": "a"}, {"name": "a"}]}, "Two models have the name 'a'"),
        ({"models": [{"min_replicas": 3, "max_replicas": 2}]}, "min_replicas is 3 and max_replicas 2"),
        ({"models": [{"options": {"num_shard": 3}, "nodes": 2}]}, "3 rank(s) cannot be divided among 2 nodes"),
        ({"models": [{"options": {"num_shard": 4}, "nodes": 2}]}, "share one host"),
        ({"models": [{}], "ingress_replicas": 0}, "`ingress_replicas` is 0"),
        ({"models": [{"options": {"num_nodes": 2}}]}, "`nodes` of the model"),
    ],
)
def test_a_wrong_description_is_refused_with_the_field_and_a_remedy(args: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError) as error:
        plan_of(args)
    assert words in str(error.value)


def test_names_and_replicas_are_filled_in() -> None:
    plan = plan_of({"models": [{"options": {"model_id": "org/some-model"}}, {"min_replicas": 0}]})
    assert [(model.name, model.max_replicas) for model in plan.models] == [("some-model", 1), ("default", 1)]


def test_options_become_words_and_secrets_become_variables() -> None:
    model = Model(
        options={"num_shard": 2, "mock": True, "api_key": "s3cret", "cors_allow_origin": ["a", "b"], "hf_token": "t"},
        environment={"LOG": "1"},
    )
    words, environment = words_and_environment(model)
    assert sorted(words) == ["--cors-allow-origin=a,b", "--mock=true", "--num-shard=2"]
    assert environment == {"LOG": "1", "API_KEY": "s3cret", "HF_TOKEN": "t"}


@pytest.mark.parametrize(
    "options,has_gpus,cpus,gpus,threads",
    [
        ({}, False, 1, 0, 1),
        ({"cpu_threads": 1, "num_shard": 4}, False, 4, 0, 1),
        ({"num_shard": 4}, True, 4, 4, 1),
        ({"num_shard": 4, "mock": True}, True, 4, 0, 1),
        ({"num_shard": 2, "device": "cuda"}, False, 2, 2, 1),
        ({"num_shard": 2, "device": "cpu"}, True, 2, 0, 1),
        ({"num_shard": 2, "pipeline_parallel_size": 2, "data_parallel_size": 3}, True, 12, 12, 1),
    ],
)
def test_a_replica_reserves_what_its_ranks_need(
    options: dict[str, Any], has_gpus: bool, cpus: float, gpus: float, threads: int
) -> None:
    found = resources_of(Model(options=options), has_gpus)
    assert (found.cpus, found.gpus, found.threads) == (cpus, gpus, threads)


def test_given_resources_are_divided_among_ranks_and_nodes() -> None:
    found = resources_of(Model(options={"num_shard": 4, "device": "cuda"}, cpus=16, nodes=2), True)
    assert found.threads == 4
    assert found.bundles == ({"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 2})


def test_the_command_prints_the_config_that_it_would_deploy_without_secrets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    words = ["--print-config", "--num-shard", "2", "--port", "81", "--hostname", "::1", "--max-replicas", "3"]
    words += ["--model-id", "org/m", "--target-queue", "9", "--cors-allow-origin", "x", "--api-key", "key_secret"]
    assert command.main(words) == 0
    printed = capsys.readouterr()
    config = json.loads(printed.out)
    assert config["http_options"] == {"host": "::1", "port": 81}
    (application,) = config["applications"]
    (model,) = application["args"]["models"]
    assert model["options"] == {"num_shard": 2, "model_id": "org/m", "cors_allow_origin": ["x"]}
    assert plan_of(application["args"]).models[0].scaling.target_queue == 9
    assert "secret" not in printed.out + printed.err
    assert "API_KEY, HF_TOKEN" in printed.err


@pytest.mark.parametrize(
    "words,message",
    [
        (["--min-replicas", "3", "--max-replicas", "2"], "min_replicas is 3"),
        (["--max-input-tokens", "9", "--max-total-tokens", "9"], "must be <"),
        (["--name", "health"], "another `name`"),
    ],
)
def test_the_command_checks_its_options_before_it_looks_for_a_cluster(words: list[str], message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        command.main(words)
    assert message in str(error.value)


def test_a_failed_deployment_is_explained_by_the_server_itself() -> None:
    trace = (
        "Traceback:\n  raise StartError(HAS_ENDED + x)\ntokenmill.errors.StartError: "
        + HAS_ENDED
        + "Error: Model: no.\n"
    )
    assert command.reason(["", trace, "Deploying failed."]) == HAS_ENDED + "Error: Model: no."
    assert command.reason(["other", "Deploying failed."]) == "Deploying failed."


# The model of a request


@pytest.mark.parametrize(
    "path,body,name,rest",
    [
        ("/generate", b"{}", "small", "/generate"),
        ("/large/generate", b"{}", "large", "/generate"),
        ("/large", b"", "large", "/"),
        ("/largest/generate", b"{}", "small", "/largest/generate"),
        ("/v1/completions", b'{"model": "large"}', "large", "/v1/completions"),
        ("/v1/completions", b'{"model": "org/large"}', "large", "/v1/completions"),
        ("/v1/completions", b'{"model": "tgi"}', "small", "/v1/completions"),
        ("/v1/completions", b'{"model": null, "x": [1]}', "small", "/v1/completions"),
        ("/v1/completions", b'{"model": 3}', "small", "/v1/completions"),
        ("/v1/completions", b"not JSON", "small", "/v1/completions"),
        ("/small/v1/completions", b'{"model": "large"}', "small", "/v1/completions"),
        ("/v2/models/large/infer", b"{}", "large", "/v2/models/large/infer"),
    ],
)
def test_the_path_comes_before_the_body_and_the_first_model_is_for_those_that_name_none(
    path: str, body: bytes, name: str, rest: str
) -> None:
    served, path = select(BOTH, path, body)
    assert (served.name, path) == (name, rest)


def test_of_several_models_an_unknown_one_is_refused_and_a_single_model_gets_every_request() -> None:
    for path, body in (("/v1/completions", b'{"model": "huge"}'), ("/v2/models/huge/infer", b"{}")):
        with pytest.raises(NotFound, match="'huge' does not exist; served are 'small', 'large'"):
            select(BOTH, path, body)
        assert select(BOTH[:1], path, body) == (BOTH[0], path)


# Prompts


def test_each_turn_of_a_chat_begins_with_the_text_of_the_one_before() -> None:
    messages: list[dict[str, str]] = [{"role": "system", "content": "You “know” much. " * 30}]
    before: list[bytes] = []
    for turn in range(6):
        messages += [{"role": "user", "content": f"Frage {turn}? " * 9}, {"role": "assistant", "content": "Ja. " * 9}]
        body = json.dumps({"model": "m", "messages": messages[:-1], "max_tokens": 5 + turn}).encode()
        text, limit = prompt_and_limit(body)
        keys = prompt_of_text(text).keys
        assert limit == 5 + turn
        assert keys[: len(before)] == before
        before = keys
    assert len(before) > 8


@pytest.mark.parametrize(
    "body,text,limit",
    [
        ({"inputs": "Once", "parameters": {"max_new_tokens": 7}}, "Once", 7),
        ({"prompt": "Once", "max_tokens": 3}, "Once", 3),
        ({"prompt": [1, 2]}, "1\n2\n", 1 << 20),
        ({"inputs": [{"name": "x", "data": ["Once"]}]}, '{"name": "x", "data": ["Once"]}\n', 1 << 20),
        ({"messages": [{"role": "user"}], "tools": [1]}, '[1]{"role": "user"}\n', 1 << 20),
        ({"model": "m"}, "", 0),
        ([], "", 0),
        ("inputs", "", 0),
    ],
)
def test_the_prompt_of_every_api_is_found(body: Any, text: str, limit: int) -> None:
    assert prompt_and_limit(json.dumps(body).encode()) == (text, limit)
    assert prompt_and_limit(json.dumps(body).encode()[:-1]) == ("", 0)


# Merged answers


def test_metrics_of_replicas_keep_their_form_with_a_label_for_each(run_dir: Any) -> None:
    client = pytest.importorskip("prometheus_client.parser")
    texts = []
    for index in range(2):
        (run_dir / str(index)).mkdir()
        one = Metrics(str(run_dir / str(index)), 0)
        one.set_info(model="a {b} c")
        one.observe("tokenmill_time_to_first_token_seconds", 0.5 + index)
        one.add("tgi_request_failure", "validation", amount=index + 1)
        texts.append(({"deployment": "m", "replica": str(index)}, one.text()))
        one.close()
    families = {one.name: one for one in client.text_string_to_metric_families(merged.metrics(texts))}
    failures = families["tgi_request_failure"].samples
    assert {one.labels["replica"]: one.value for one in failures if one.labels["err"] == "validation"} == {
        "0": 1, "1": 2,
    }  # fmt: skip
    assert {one.labels["replica"] for one in families["tokenmill_model_info"].samples} == {"0", "1"}
    alone = {one.name for one in client.text_string_to_metric_families(texts[0][1])}
    assert set(families) == alone


def test_models_are_listed_under_their_names() -> None:
    bodies = [(one.name, json.dumps({"object": "list", "data": [{"id": one.model_id}]}).encode()) for one in BOTH]
    assert [one["id"] for one in json.loads(merged.models(bodies))["data"]] == ["small", "large"]
    assert json.loads(merged.model(bodies, "large")) == {"id": "large"}
    with pytest.raises(NotFound, match="'huge' does not exist"):
        merged.model(bodies, "huge")


# Load


def test_the_metrics_that_load_is_read_from_exist() -> None:
    known = {metric.name for metric in CATALOG}
    assert {name.removesuffix("_sum").removesuffix("_count") for name in READ_METRICS} <= known


def scrape(run_dir: Any, **values: float) -> str:
    metrics = Metrics(str(run_dir), 0)
    for name, value in values.items():
        if name == "first_tokens":
            for _ in range(int(value)):
                metrics.observe("tokenmill_time_to_first_token_seconds", 3.0)
        elif name.endswith("_total"):
            metrics.add(name, amount=value)
        else:
            metrics.set(name, value)
    text = metrics.text()
    metrics.close()
    return text


def test_the_predicted_time_to_the_first_token_follows_the_queue_and_the_rate(run_dir: Any) -> None:
    meter = LoadMeter()
    meter.read(scrape(run_dir, tokenmill_engine_up=1.0, tgi_batch_max_total_tokens=5000.0), 10.0)
    busy = {"tgi_queue_size": 10.0, "tokenmill_requests_in_flight": 20.0}
    load = Load()
    for second in range(11, 41):  # 10 prompts of 100 tokens, 500 tokens a second
        more = {"tokenmill_prompt_tokens_total": 500.0, "tokenmill_prefill_tokens_total": 500.0, "first_tokens": 5}
        load = meter.read(scrape(run_dir, **busy, **more), float(second))
    assert load.waiting == 10
    assert load.capacity == 5000
    assert load.up == 1
    assert load.ttft_s == pytest.approx(3.0, rel=0.05)  # measured: more than the 2 s of the queue
    idle = {"tgi_queue_size": 0.0, "tokenmill_requests_in_flight": 0.0}
    for second in range(41, 61):
        load = meter.read(scrape(run_dir, **idle), float(second))
    assert load.ttft_s < 0.01
    queue = meter.read(scrape(run_dir, tgi_queue_size=50.0), 61.0)
    assert queue.ttft_s == pytest.approx(50 * 100 / 500, rel=0.05)  # nothing measured yet: predicted from the queue


def test_values_of_several_labels_are_added() -> None:
    assert values_of('tgi_queue_size{a="x y"} 3\ntgi_queue_size{a="b"} 4\nother 5\n# HELP tgi_queue_size x\n') == {
        "tgi_queue_size": 7.0
    }


# Scaling

TARGETS = Scaling(target_queue=4, target_ttft_s=2, target_running=0.8)


def wanted(current: int, **load: float) -> float:
    return replicas_wanted([Load(up=1, **load)] * current, current, TARGETS, 10)


@pytest.mark.parametrize(
    "current,load,expected",
    [
        (1, {"waiting": 12}, 3),
        (2, {"waiting": 2, "running": 6}, 2),
        (2, {"running": 9.6}, 2.4),
        (2, {"waiting": 1, "ttft_s": 6}, 6),
        (2, {"running": 5, "ttft_s": 6}, 2),  # slow without a queue: more replicas would not help
        (3, {}, 2),
        (1, {}, 0),
        (3, {"running": 1}, 2),
        (3, {"running": 4}, 3),  # two replicas would have 6 of 8
        (0, {}, 0),
    ],
)
def test_the_target_that_is_exceeded_most_decides(current: int, load: dict[str, float], expected: float) -> None:
    assert wanted(current, **load) == pytest.approx(expected)


def test_more_load_never_wants_fewer_replicas() -> None:
    for current, ttft_s, running in itertools.product((1, 2, 5), (0.0, 1.0, 3.0), (0.0, 3.0, 10.0)):
        found = [wanted(current, waiting=w, ttft_s=ttft_s, running=running) for w in range(20)]
        assert found == sorted(found)


def test_the_policy_reads_what_serve_has_collected() -> None:
    context = SimpleNamespace(current_num_replicas=2)
    context.aggregated_metrics = {"waiting": {"a": 4.0, "b": 12.0}, "running": {"a": 10.0, "b": 10.0}}
    policy = Policy({"target_queue": 4.0}, 100)
    assert policy(context) == (4.0, {})
    context.aggregated_metrics = {}
    assert policy(context) == (2, {})
