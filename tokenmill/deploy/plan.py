"""The description of a deployment, as plain data: the `args` of a Ray Serve config, checked and completed.

Options of a server are those of `tokenmill serve`, by field name (`num_shard: 2`). No module of Ray is imported here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from tokenmill import options
from tokenmill.config import Settings
from tokenmill.errors import ArgumentError
from tokenmill.server.routes.table import ROUTES

_OWN = {"port": "Ray Serve's proxy has the port: `http_options`, or --port of `tokenmill deploy`",
        "hostname": "Ray Serve's proxy has the address: `http_options`, or --hostname of `tokenmill deploy`",
        "env": "start `tokenmill env` on a node", "warnings": "it is none",
        **dict.fromkeys(("num_nodes", "node_rank", "master_addr", "master_port", "cluster_secret_file"),
                        "`nodes` of the model is the number of hosts that its ranks are divided among")}  # fmt: skip
"""Fields of `Settings` that a replica sets itself -> where the user finds them."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
RESERVED = frozenset(route.path.split("/")[1] for route in ROUTES) | {"replicas", "-"}
"""First parts of paths, which models cannot have as names."""


class Scaling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits and targets of autoscaling; see `scaling.py`.

    `target_queue`: waiting requests of a replica. `target_ttft_s`: predicted seconds to the first token of a request
    that arrives now. `target_running`: part of the running batch's places that are taken. `up_after_s`, `down_after_s`:
    seconds for which more or fewer replicas must be wanted. `look_back_s`: seconds over which the state of replicas
    is averaged; more than the 10 between two reports.
    """

    target_queue: float = 4.0
    target_ttft_s: float = 2.0
    target_running: float = 0.8
    up_after_s: float = 10.0
    down_after_s: float = 300.0
    look_back_s: float = 15.0


class Model(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model of a deployment, and its replicas.

    `name`: as in the `model` field of requests and as the first part of their paths; "": the last part of the model's
    id. `options`: of `tokenmill serve`. `environment`: variables of the server's process, for secrets. `cpus`, `gpus`:
    of one replica; None: as its options need. `nodes`: hosts that the ranks of one replica are divided among.
    `routing`: by cached prefix and outstanding tokens, or at random, to compare with. `direct`: replicas listen on the
    address of their host, for clients that do not go through the proxy. `recovery_s`: seconds for which a server may be
    unhealthy before its replica is replaced.
    """

    name: str = ""
    options: dict[str, Any] = {}
    environment: dict[str, str] = {}
    min_replicas: int = 1
    max_replicas: int | None = None
    scaling: Scaling = Scaling()
    cpus: float | None = None
    gpus: float | None = None
    nodes: int = 1
    routing: Literal["prefix", "random"] = "prefix"
    direct: bool = False
    recovery_s: float = 60.0


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A deployment. `ingress_replicas`: processes that choose replicas and pass answers on."""

    models: tuple[Model, ...]
    ingress_replicas: int = 1


def plan_of(args: Mapping[str, Any]) -> Plan:
    """Return the plan that plain data describes, with names filled in. Raises ArgumentError that names the field."""
    try:
        plan = msgspec.convert(dict(args), Plan)
    except msgspec.ValidationError as error:
        raise ArgumentError(f"The arguments of the application are wrong: {error}.") from None
    if not plan.models:
        raise ArgumentError("`models` is empty. Give one model at least; `options: {}` is the embedded default.")
    if plan.ingress_replicas < 1:
        raise ArgumentError(f"`ingress_replicas` is {plan.ingress_replicas}, but must be at least 1.")
    models = tuple(map(_checked, plan.models))
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ArgumentError(f"Two models have the name {twice!r}. Give each model a `name` of its own.")
    return msgspec.structs.replace(plan, models=models)


def _checked(model: Model) -> Model:
    settings = settings_of(model)
    name = model.name or settings.model_id.rstrip("/").rpartition("/")[2] or "default"
    most = max(model.min_replicas, 1) if model.max_replicas is None else model.max_replicas
    if not _NAME.fullmatch(name) or name in RESERVED:
        raise ArgumentError(
            f"A model cannot have the name {name!r}: it must consist of letters, digits and . _ -, and no path of the "
            "API may begin with it. Give another `name`."
        )
    if not 0 <= model.min_replicas <= most or most < 1:
        raise ArgumentError(
            f"Model {name!r}: min_replicas is {model.min_replicas} and max_replicas {most}. Needed: 0 <= min_replicas "
            "<= max_replicas, and max_replicas of at least 1."
        )
    if model.nodes < 1 or num_ranks(settings) % model.nodes:
        raise ArgumentError(
            f"Model {name!r}: {num_ranks(settings)} rank(s) cannot be divided among {model.nodes} nodes. Give a number "
            "of nodes that divides the number of ranks."
        )
    if model.nodes > 1:
        raise ArgumentError(
            f"Model {name!r}: `nodes` is {model.nodes}, but in this release the ranks of a replica share one host. "
            "Leave it out."
        )
    return msgspec.structs.replace(model, name=name, max_replicas=most)


def settings_of(model: Model) -> Settings:
    """Return the settings of a replica's server, checked as `tokenmill serve` checks them. Raises ArgumentError."""
    fields = {field.name: field for field in options.fields_of(Settings)}
    for name, value in model.options.items():
        if name in _OWN:
            raise ArgumentError(f"`options` has {name!r}, which a replica sets itself: {_OWN[name]}.")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            raise ArgumentError(
                f"`options` has {name!r}, which is no option of `tokenmill serve`"
                + (f"; did you mean {near[0]!r}?" if near else ". `tokenmill serve --help` lists them, with dashes.")
            )
        try:
            options.value_of(fields[name], _text(value))
        except ValueError as error:
            raise ArgumentError(f"`options`: {name}: {error}.") from None
    values = {name: options.value_of(fields[name], _text(value)) for name, value in model.options.items()}
    return Settings.from_env({}, **values)


def num_ranks(settings: Settings) -> int:
    """Return the number of engine ranks of one server, of all its engines."""
    return settings.ranks_per_engine * settings.data_parallel_size


def words_and_environment(model: Model) -> tuple[list[str], dict[str, str]]:
    """Return the command line of `tokenmill serve` for a model's options, and the variables beside it.

    Secrets are variables, because command lines can be read by everybody on the host.
    """
    words: list[str] = []
    environment = dict(model.environment)
    for field in options.fields_of(Settings):
        if field.name not in model.options:
            continue
        text = _text(model.options[field.name])
        if field.option.env_only or field.option.secret:
            environment[field.variables[0]] = text
        else:
            words.append(f"{field.flag}={text}")
    return words, environment


def _text(value: Any) -> str:
    """Return a value of YAML as on a command line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


class Resources(msgspec.Struct, frozen=True):
    """Resources of one replica. `bundles`: of each node, the first of them the replica actor's own."""

    cpus: float
    gpus: float
    threads: int  # compute threads of a rank on a CPU
    bundles: tuple[dict[str, float], ...]


def resources_of(model: Model, cluster_has_gpus: bool) -> Resources:
    """Return the resources that Ray reserves for one replica.

    A rank gets a GPU, or the CPUs of its threads where it computes on them.
    """
    settings = settings_of(model)
    ranks = num_ranks(settings)
    on_gpu = settings.device == "cuda" or (settings.device == "auto" and cluster_has_gpus and not settings.mock)
    cpus = float(ranks * (settings.cpu_threads or 1)) if model.cpus is None else model.cpus
    gpus = (float(ranks) if on_gpu else 0.0) if model.gpus is None else model.gpus
    threads = settings.cpu_threads or max(1, int(cpus) // ranks)
    bundle = {"CPU": cpus / model.nodes, **({"GPU": gpus / model.nodes} if gpus else {})}
    return Resources(cpus, gpus, threads, (bundle,) * model.nodes)
