"""`tokenmill deploy`: serve a model on a Ray cluster, or on one of its own that ends with the command."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from tokenmill import options
from tokenmill.config import Settings
from tokenmill.deploy.plan import Model, Scaling, plan_of
from tokenmill.deploy.server_process import HAS_ENDED
from tokenmill.errors import ArgumentError, StartError
from tokenmill.extras import need_ray
from tokenmill.listening import place
from tokenmill.options import Option

_PROG = "tokenmill deploy"


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """Options of the command beside those of `tokenmill serve`."""

    # fmt: off
    address: Annotated[str, Option("Address of a running Ray cluster. Default: the one on this host; else one is "
                                   "started here.", env="RAY_ADDRESS")] = ""
    app: Annotated[str, Option("Name of the application.", env="")] = "tokenmill"
    route_prefix: Annotated[str, Option("Path below which it answers.", env="")] = "/"
    name: Annotated[str, Option("Name of the model. Default: the last part of its id.", env="")] = ""
    min_replicas: Annotated[int, Option("Replicas at least.", at_least=0, env="")] = 1
    max_replicas: Annotated[int | None, Option("Replicas at most. Default: --min-replicas.", at_least=1, env="")] = None
    target_queue: Annotated[float, Option("Waiting requests of a replica above which more replicas start.",
                                          at_least=0.01, env="")] = Scaling().target_queue
    target_ttft: Annotated[float, Option("Predicted seconds to the first token above which more replicas start.",
                                         at_least=0.001, env="")] = Scaling().target_ttft_s
    up_after: Annotated[float, Option("Seconds for which more replicas must be wanted.", at_least=0, env="")] = (
        Scaling().up_after_s)
    down_after: Annotated[float, Option("Seconds for which fewer replicas must be wanted.", at_least=0, env="")] = (
        Scaling().down_after_s)
    replica_cpus: Annotated[float | None, Option("CPUs of a replica. Default: those of its ranks' threads.",
                                                 at_least=0, env="")] = None
    replica_gpus: Annotated[float | None, Option("GPUs of a replica. Default: one a rank, if it computes on them.",
                                                 at_least=0, env="")] = None
    ingress_replicas: Annotated[int, Option("Processes that route requests.", at_least=1, env="")] = 1
    direct: Annotated[bool, Option("Replicas also listen on their host's address; /replicas lists them.", env="")] = (
        False)
    detach: Annotated[bool, Option("Return when the application runs, and leave it running.", env="")] = False
    delete: Annotated[bool, Option("End the application --app, after its requests, and do nothing else.", env="")] = (
        False)
    print_config: Annotated[bool, Option("Print the config for `serve deploy` and KubeRay, and do nothing.",
                                         env="")] = False
    # fmt: on


def main(words: Sequence[str]) -> int:
    """Deploy until a signal comes; return the exit code. Raises StartError."""
    about = (
        "Serve a model with Ray Serve. Options of `tokenmill serve` are options of each replica's server; --hostname "
        "and --port are those of Serve's proxies."
    )
    parser = options.Parser(prog=_PROG, usage=f"{_PROG} [OPTIONS]", description=about)
    options.add_options(parser, Wanted)
    options.add_options(parser, Settings)
    given = parser.parse_args(list(words))
    values, _ = options.collect(Wanted, given, Settings.environ())
    wanted = Wanted(**values)
    if wanted.delete:
        need_ray()
        return _delete(wanted)
    http, args = http_options(given), args_of(wanted, given)
    plan_of(args)
    if wanted.print_config:
        hidden = sorted(args["models"][0].pop("environment", ()))
        print(json.dumps(config_of(wanted, http, args), indent=2))
        if hidden:
            print(f"Left out: {', '.join(hidden)}, which belong below `environment` of the model.", file=sys.stderr)
        return 0
    need_ray()
    return _deploy(wanted, http, args)


def http_options(given: argparse.Namespace) -> dict[str, Any]:
    """Return Serve's options of HTTP for the parsed command line: address and port, as a server has them."""
    settings = Settings.from_namespace(given)
    return {"host": settings.hostname, "port": settings.port}


def args_of(wanted: Wanted, given: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of the application for the parsed command line, as plain data.

    Secrets of this process's environment are handed to the replicas.
    """
    serving: dict[str, Any] = {}
    environment: dict[str, str] = {}
    for field in options.fields_of(Settings):
        if field.name in ("hostname", "port", "env", "warnings"):
            continue
        if field.option.secret:
            value = getattr(given, field.name, "") or _first(field.variables)
            if value:
                environment[field.variables[0]] = value
        elif hasattr(given, field.name):
            value = getattr(given, field.name)
            serving[field.name] = list(value) if isinstance(value, tuple) else value
    scaling = Scaling(
        target_queue=wanted.target_queue, target_ttft_s=wanted.target_ttft,
        up_after_s=wanted.up_after, down_after_s=wanted.down_after,
    )  # fmt: skip
    model = Model(
        name=wanted.name, options=serving, environment=environment, min_replicas=wanted.min_replicas,
        max_replicas=wanted.max_replicas, scaling=scaling, cpus=wanted.replica_cpus, gpus=wanted.replica_gpus,
        direct=wanted.direct,
    )  # fmt: skip
    return {"models": [_given(model)], "ingress_replicas": wanted.ingress_replicas}


def _first(variables: Sequence[str]) -> str:
    environ = Settings.environ()
    return next((environ[name] for name in variables if environ.get(name)), "")


def _given(model: Model) -> dict[str, Any]:
    """Return the fields of a model that differ from their defaults."""
    plain, default = msgspec.to_builtins(model), msgspec.to_builtins(Model())
    return {name: value for name, value in plain.items() if value != default[name]}


def config_of(wanted: Wanted, http: dict[str, Any], args: dict[str, Any]) -> dict[str, Any]:
    """Return the config of Ray Serve that deploys the same. JSON is YAML, too."""
    application = {"name": wanted.app, "route_prefix": wanted.route_prefix,
                   "import_path": "tokenmill.deploy.app:build", "args": args}  # fmt: skip
    return {"proxy_location": "EveryNode", "http_options": http, "applications": [application]}


def _deploy(wanted: Wanted, http: dict[str, Any], args: dict[str, Any]) -> int:
    import ray
    from ray import serve

    from tokenmill.deploy.app import build

    _connect(wanted)
    serve.start(proxy_location="EveryNode", http_options=http)
    try:
        serve.run(build(args), name=wanted.app, route_prefix=wanted.route_prefix)
    except RuntimeError as error:
        status = serve.status().applications.get(wanted.app)
        messages = [one.message for one in status.deployments.values()] if status else []
        serve.delete(wanted.app)
        raise StartError(f"The application could not be deployed. {reason([*messages, str(error)])}") from None
    host = "127.0.0.1" if http["host"] in ("0.0.0.0", "::") else http["host"]
    url = f"http://{place(host, http['port'])}{wanted.route_prefix.rstrip('/')}"
    print(f"Ready: {args['models'][0].get('name') or 'the model'} at {url}, on every node of the cluster.", flush=True)
    if wanted.detach:
        print(
            f"`serve status` shows the replicas; `tokenmill deploy --delete --app {wanted.app}` ends the application."
        )
        ray.shutdown()
        return 0
    _wait_for_signal()
    print("Stopping: running requests are finished.", file=sys.stderr, flush=True)
    serve.delete(wanted.app)
    serve.shutdown()
    ray.shutdown()
    return 0


def _delete(wanted: Wanted) -> int:
    import ray
    from ray import serve

    _connect(wanted)
    running = serve.status().applications
    if wanted.app not in running:
        names = ", ".join(map(repr, running)) or "none"
        raise ArgumentError(f"There is no application {wanted.app!r} on this cluster. Give one with --app: {names}.")
    serve.delete(wanted.app)
    ray.shutdown()
    return 0


def _connect(wanted: Wanted) -> None:
    """Connect to the cluster, or start one here. Raises StartError."""
    import ray

    try:
        ray.init(address=wanted.address or "auto", log_to_driver=not wanted.detach)
    except ConnectionError as error:
        if wanted.address:
            raise StartError(
                f"There is no Ray cluster at {wanted.address!r}, or it does not accept this command: {error}. If it "
                "asks for a token, ~/.ray/auth_token must be the same on all hosts, and RAY_AUTH_MODE=token be set."
            ) from None
        if wanted.detach or wanted.delete:
            raise ArgumentError(
                "There is no running Ray cluster on this host, and one that this command starts would end with it. "
                "Start one with `ray start --head`, or give its --address."
            ) from None
        ray.init(address="local")


def reason(messages: Sequence[str]) -> str:
    """Return the cause of a failed deployment from what Serve reports: the server's own error if there is one."""
    for text in messages:
        for line in text.splitlines():
            _, found, error = line.partition(f"{StartError.__name__}: {HAS_ENDED}")
            if found:
                return f"{HAS_ENDED}{error}"
    return messages[-1].strip()


def _wait_for_signal() -> None:
    """Block until SIGINT or SIGTERM comes."""
    came = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: came.set())
    while not came.wait(3600):
        pass
