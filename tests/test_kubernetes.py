"""Manifests of deploy/kubernetes: their fields, by the API's types, and their values, by the code."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tokenmill.config import Settings
from tokenmill.deploy.plan import plan_of
from tokenmill.launcher import STOP_S
from tokenmill.options import fields_of
from tokenmill.server.metrics import CATALOG
from tokenmill.server.routes.table import ROUTES

yaml = pytest.importorskip("yaml")

FOLDER = Path(__file__).resolve().parent.parent / "deploy" / "kubernetes"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
CORE = {
    "Deployment": "V1Deployment", "HorizontalPodAutoscaler": "V2HorizontalPodAutoscaler", "Service": "V1Service",
    "PodDisruptionBudget": "V1PodDisruptionBudget",
}  # fmt: skip

# Custom resources, which the package `kubernetes` has no types of: the fields that a manifest here may use. A type is a
# name in this table, one of `kubernetes`, or a plain one; "!" marks fields that must be there.
CUSTOM: dict[str, dict[str, str]] = {
    "RayService": {"apiVersion": "str!", "kind": "str!", "metadata": "V1ObjectMeta!", "spec": "RayServiceSpec!"},
    "RayServiceSpec": {
        "serveConfigV2": "str!", "rayClusterConfig": "RayClusterSpec!", "serveService": "V1Service",
        "excludeHeadPodFromServeSvc": "bool", "rayClusterDeletionDelaySeconds": "int", "suspend": "bool",
    },
    "RayClusterSpec": {
        "rayVersion": "str", "enableInTreeAutoscaling": "bool", "autoscalerOptions": "object", "suspend": "bool",
        "headGroupSpec": "HeadGroupSpec!", "workerGroupSpecs": "list[WorkerGroupSpec]",
    },
    "HeadGroupSpec": {"rayStartParams": "dict(str, str)", "template": "V1PodTemplateSpec!", "serviceType": "str",
                      "headService": "V1Service", "enableIngress": "bool"},
    "WorkerGroupSpec": {
        "groupName": "str!", "replicas": "int", "minReplicas": "int", "maxReplicas": "int", "numOfHosts": "int",
        "idleTimeoutSeconds": "int", "rayStartParams": "dict(str, str)", "template": "V1PodTemplateSpec!",
    },
    "ServingRuntime": {"apiVersion": "str!", "kind": "str!", "metadata": "V1ObjectMeta!",
                       "spec": "ServingRuntimeSpec!"},
    "ServingRuntimeSpec": {
        "annotations": "dict(str, str)", "labels": "dict(str, str)", "multiModel": "bool", "disabled": "bool",
        "protocolVersions": "list[str]", "supportedModelFormats": "list[SupportedModelFormat]",
        "containers": "list[V1Container]!", "volumes": "list[V1Volume]", "nodeSelector": "dict(str, str)",
        "tolerations": "list[V1Toleration]", "affinity": "V1Affinity",
        "imagePullSecrets": "list[V1LocalObjectReference]",
    },
    "SupportedModelFormat": {"name": "str!", "version": "str", "autoSelect": "bool", "priority": "int"},
    "InferenceService": {"apiVersion": "str!", "kind": "str!", "metadata": "V1ObjectMeta!",
                         "spec": "InferenceServiceSpec!"},
    "InferenceServiceSpec": {"predictor": "PredictorSpec!"},
    "PredictorSpec": {
        "minReplicas": "int", "maxReplicas": "int", "scaleTarget": "int", "scaleMetric": "str", "timeout": "int",
        "containerConcurrency": "int", "model": "ModelSpec!", "terminationGracePeriodSeconds": "int",
    },
    "ModelSpec": {"modelFormat": "ModelFormat!", "runtime": "str", "storageUri": "str", "protocolVersion": "str",
                  "args": "list[str]", "env": "list[V1EnvVar]", "resources": "V1ResourceRequirements"},
    "ModelFormat": {"name": "str!", "version": "str"},
}  # fmt: skip
PLAIN = {"str": str, "int": int, "bool": bool, "float": (int, float), "object": object, "datetime": str}


def manifests() -> Iterator[tuple[str, dict[str, Any]]]:
    for name in FILES:
        for one in yaml.safe_load_all((FOLDER / name).read_text()):
            yield name, one


def faults(kind: str, value: Any, where: str) -> Iterator[str]:
    """Yield what is wrong with a value that should be of a type: unknown and missing fields, wrong types."""
    if listed := re.fullmatch(r"list\[(.+)\]", kind):
        if not isinstance(value, list):
            yield f"{where} is no list"
            return
        for index, one in enumerate(value):
            yield from faults(listed[1], one, f"{where}[{index}]")
    elif mapped := re.fullmatch(r"dict\(str, (.+)\)", kind):
        if not isinstance(value, dict):
            yield f"{where} is no mapping"
            return
        for key, one in value.items():
            yield from faults(mapped[1], one, f"{where}.{key}")
    elif kind in PLAIN:
        if not isinstance(value, PLAIN[kind]) or (kind != "bool" and kind != "object" and isinstance(value, bool)):  # type: ignore[arg-type]
            yield f"{where} is {value!r}, not of type {kind}"
    else:
        yield from _faults_of_object(kind, value, where)


def _faults_of_object(kind: str, value: Any, where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where} is no object"
        return
    if kind not in CUSTOM:
        yield from _faults_of_api_type(kind, value, where)
        return
    types = CUSTOM[kind]
    for key in value:
        if key not in types:
            yield f"{where} has the unknown field {key!r}"
        else:
            yield from faults(types[key].rstrip("!"), value[key], f"{where}.{key}")
    for key, found in types.items():
        if found.endswith("!") and value.get(key) is None:
            yield f"{where} has no {key!r}"


def _faults_of_api_type(kind: str, value: dict[str, Any], where: str) -> Iterator[str]:
    """Yield what the package `kubernetes` finds. Its types forbid unknown fields."""
    client = pytest.importorskip("kubernetes.client")
    pydantic = pytest.importorskip("pydantic")
    try:
        getattr(client, kind).model_validate(value, strict=True)
    except pydantic.ValidationError as error:
        for one in error.errors():
            yield f"{where}.{'.'.join(map(str, one['loc']))}: {one['msg']}"


def faults_of(manifest: dict[str, Any]) -> list[str]:
    kind = manifest["kind"]
    return list(faults(CORE.get(kind, kind), manifest, kind))


def test_every_manifest_has_the_fields_of_its_kind_and_no_others() -> None:
    pytest.importorskip("kubernetes.client")
    kinds = {one["kind"] for _, one in manifests()}
    assert kinds == {*CORE, "RayService", "ServingRuntime", "InferenceService"}
    assert {name: found for name, one in manifests() if (found := faults_of(one))} == {}


def test_a_field_that_does_not_exist_a_missing_one_and_a_wrong_type_are_found() -> None:
    pytest.importorskip("kubernetes.client")
    by_kind = {one["kind"]: one for _, one in manifests()}
    deployment = copy.deepcopy(by_kind["Deployment"])
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    container["startupProbe"]["failureTreshold"] = 3
    del container["name"]
    container["ports"][0]["containerPort"] = "3000"
    deployment["spec"]["template"]["spec"]["enableServiceLinks"] = "no"
    found = "\n".join(faults_of(deployment))
    assert "startupProbe.failureTreshold: Extra inputs are not permitted" in found
    assert "containers.0.name: Field required" in found
    assert "containerPort: Input should be a valid integer" in found
    assert "enableServiceLinks: Input should be a valid boolean" in found
    service = copy.deepcopy(by_kind["RayService"])
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["imag"] = "x"
    service["spec"]["serveConfig"] = service["spec"].pop("serveConfigV2")
    found = "\n".join(faults_of(service))
    assert "containers.0.imag: Extra inputs are not permitted" in found
    assert "unknown field 'serveConfig'" in found
    assert "no 'serveConfigV2'" in found


def containers() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield each pod's spec and container."""
    for _, one in manifests():
        spec = one["spec"]
        pods = []
        if one["kind"] == "Deployment":
            pods = [spec["template"]["spec"]]
        elif one["kind"] == "ServingRuntime":
            pods = [spec]
        elif one["kind"] == "RayService":
            config = spec["rayClusterConfig"]
            groups = [config["headGroupSpec"], *config["workerGroupSpecs"]]
            pods = [group["template"]["spec"] for group in groups]
        for pod in pods:
            for container in pod["containers"]:
                yield pod, container


def test_variables_and_options_are_those_of_the_server() -> None:
    variables = {name for field in fields_of(Settings) for name in field.variables}
    num_options = 0
    for _, container in containers():
        environment = {one["name"]: one["value"] for one in container.get("env", ())}
        assert set(environment) <= variables
        if "ray" not in container["name"]:
            settings = Settings.from_args(container["args"], environment)
            assert settings.warnings == ()
            assert settings.port in {port["containerPort"] for port in container["ports"]}
            assert settings.hostname == "0.0.0.0"
            num_options += len(container["args"])
    assert num_options > 5


def test_probes_ask_routes_that_exist_at_ports_that_are_open() -> None:
    routes = {route.path for route in ROUTES if route.method == "GET" and not route.path.endswith("*")}
    probes = 0
    for _, container in containers():
        ports = {port[key] for port in container.get("ports", ()) for key in ("name", "containerPort") if key in port}
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            if name in container:
                get = container[name]["httpGet"]
                assert get["path"] in routes
                assert get["port"] in ports
                probes += 1
    assert probes == 5
    for _, one in manifests():
        if one["kind"] == "Deployment":
            notes = one["spec"]["template"]["metadata"]["annotations"]
            assert notes["prometheus.io/path"] in routes
            assert int(notes["prometheus.io/port"]) == 3000


def test_a_pod_has_the_time_to_drain() -> None:
    by_kind = {one["kind"]: one for _, one in manifests()}
    for pod, container in containers():
        if "lifecycle" in container:
            environment = {one["name"]: one["value"] for one in container["env"]}
            drain_s = Settings.from_env(environment).graceful_termination_timeout
            sleep_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
            predictor = by_kind["InferenceService"]["spec"]["predictor"]
            period_s = (pod if "terminationGracePeriodSeconds" in pod else predictor)["terminationGracePeriodSeconds"]
            assert period_s >= sleep_s + drain_s + STOP_S + 1
        elif container["name"] == "ray-worker":
            assert pod["terminationGracePeriodSeconds"] >= Settings.from_env({}).graceful_termination_timeout + 15


def test_the_autoscaler_reads_metrics_that_exist_and_scales_what_is_deployed() -> None:
    by_kind = {one["kind"]: one for _, one in manifests()}
    spec = by_kind["HorizontalPodAutoscaler"]["spec"]
    gauges = {metric.name for metric in CATALOG if metric.kind == "gauge"}
    names = {metric["pods"]["metric"]["name"] for metric in spec["metrics"]}
    assert names <= gauges
    rule = re.search(r'"\^\((.*?)\)\$"', (FOLDER / "hpa.yaml").read_text())
    assert rule is not None
    assert set(rule[1].split("|")) == names
    deployment = by_kind["Deployment"]
    assert spec["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for selector in (
        deployment["spec"]["selector"]["matchLabels"], by_kind["Service"]["spec"]["selector"],
        by_kind["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ):  # fmt: skip
        assert selector.items() <= labels.items()
    ports = {port["name"] for port in deployment["spec"]["template"]["spec"]["containers"][0]["ports"]}
    assert {port["targetPort"] for port in by_kind["Service"]["spec"]["ports"]} <= ports


def test_the_config_of_ray_serve_is_a_plan_that_fits_its_workers() -> None:
    ray = next(one for _, one in manifests() if one["kind"] == "RayService")["spec"]
    config = yaml.safe_load(ray["serveConfigV2"])
    assert set(config) <= {"proxy_location", "http_options", "applications"}
    (application,) = config["applications"]
    assert application["import_path"] == "tokenmill.deploy.app:build"
    (model,) = plan_of(application["args"]).models
    (group,) = ray["rayClusterConfig"]["workerGroupSpecs"]
    assert model.max_replicas == group["maxReplicas"]
    cpus = group["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"]
    assert int(cpus) == model.options["cpu_threads"]


def test_kserve_serves_the_folder_that_it_downloads_to_with_the_runtime_that_is_there() -> None:
    by_kind = {one["kind"]: one for _, one in manifests()}
    runtime, model = by_kind["ServingRuntime"], by_kind["InferenceService"]["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    formats = {one["name"] for one in runtime["spec"]["supportedModelFormats"]}
    assert model["modelFormat"]["name"] in formats
    assert "--model-id=/mnt/models" in runtime["spec"]["containers"][0]["args"]
