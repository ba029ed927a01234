"""Commands of the command line. Each parses its arguments, then imports and calls the module that does the work.

Exit codes: 0 done or asked to stop, 1 an error that was explained on stderr, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tokenmill
from tokenmill import options, streams
from tokenmill.config import Settings
from tokenmill.errors import StartError


@dataclass(frozen=True, slots=True)
class Command:
    """Subcommand of `tokenmill`: its name, its function, and a line of help."""

    run: Callable[[list[str]], int]
    help: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tokenmill COMMAND …` and return the exit code."""
    return _explained(_command, _words(argv))


def _command(words: list[str]) -> int:
    commands = _commands()
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview(commands))
        return 0
    if words[0] in ("-V", "--version", "version"):
        print(f"tokenmill {tokenmill.__version__}")
        return 0
    command = commands.get(words[0])
    if command is None:
        near = difflib.get_close_matches(words[0], commands, 1)
        guess = f"; did you mean `tokenmill {near[0]}`?" if near else ""
        print(f"error: unknown command {words[0]!r}{guess}\n\n{_overview(commands)}", file=sys.stderr)
        return 2
    return command.run(words[1:])


def text_generation_launcher(argv: Sequence[str] | None = None) -> int:
    """Run `text-generation-launcher`, TGI's name for `tokenmill serve`, with the same options."""
    words = _words(argv)
    if words in (["-V"], ["--version"]):
        print(f"text-generation-launcher {tokenmill.__version__} (tokenmill)")
        return 0
    return _explained(lambda rest: serve(rest, prog="text-generation-launcher"), words)


def text_generation_server(argv: Sequence[str] | None = None) -> int:
    """Run `text-generation-server serve|download-weights|quantize MODEL_ID …`, TGI's Python command."""
    words = _words(argv)
    commands = {"serve": _serve_positional, "download-weights": download_weights, "quantize": quantize}
    if not words or words[0] in ("-h", "--help"):
        print("usage: text-generation-server {serve,download-weights,quantize} MODEL_ID [OPTIONS]")
        return 0
    if words[0] not in commands:
        print(f"error: unknown command {words[0]!r}; known: {', '.join(commands)}", file=sys.stderr)
        return 2
    return _explained(commands[words[0]], words[1:])


def text_generation_benchmark(argv: Sequence[str] | None = None) -> int:
    """Run `text-generation-benchmark`, TGI's name for measuring the engine without HTTP."""
    words = _words(argv)
    return _explained(lambda rest: int(_load("tokenmill.benchmark:main")(rest)), words)


def _commands() -> dict[str, Command]:
    return {
        "serve": Command(serve, "serve a model over HTTP"),
        "deploy": Command(lambda rest: int(_load("tokenmill.deploy.command:main")(rest)), "serve on a Ray cluster"),
        "chat": Command(lambda rest: _load("tokenmill.chat:main")(rest), "talk to a running server, or to one's own"),
        "generate": Command(lambda rest: _load("tokenmill.generate:main")(rest), "answer a prompt without a server"),
        "download-weights": Command(download_weights, "get a model onto this machine"),
        "quantize": Command(quantize, "write a model's weights in 4 bits (GPTQ)"),
        "warmup": Command(warmup, "compile now what a first start would compile"),
        "env": Command(env, "say what is installed and found here"),
        "doctor": Command(doctor, "say what would be served here, by which kernels, and what is in the way"),
        "schema": Command(schema, "print the OpenAPI document of the server, or a page of the reference"),
    }


def _overview(commands: dict[str, Command]) -> str:
    width = max(map(len, commands))
    rows = [f"  {name.ljust(width)}  {command.help}" for name, command in commands.items()]
    return "\n".join([
        f"tokenmill {tokenmill.__version__}: a server for large language models", "",
        "usage: tokenmill COMMAND [OPTIONS]", "", *rows, "", "`tokenmill COMMAND --help` lists a command's options.",
    ])  # fmt: skip


def _words(argv: Sequence[str] | None) -> list[str]:
    """Return the words of a command. None: those of this process, whose output streams are then set up too."""
    if argv is not None:
        return list(argv)
    streams.install(lossy=False)
    return sys.argv[1:]


def _explained(run: Callable[[list[str]], int], words: list[str]) -> int:
    try:
        try:
            return run(words)
        finally:
            sys.stdout.flush()  # here, so that a failed write is explained too
    except StartError as error:
        print(f"Error: {error.variant}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except BrokenPipeError:
        return 1  # the reader of the output has closed it
    except KeyboardInterrupt:
        return 130


def _load(target: str) -> Any:
    """Import MODULE:NAME. Called on use, so that each command imports only the modules that it needs."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def serve(words: list[str], prog: str = "tokenmill serve") -> int:
    """Serve until a signal stops the server."""
    return _serve(Settings.from_args(words, prog=prog))


def _serve(settings: Settings) -> int:
    environment = _load("tokenmill.operate.env:report")() if settings.env else ""
    return int(_load("tokenmill.launcher:serve")(settings, environment))


def _serve_positional(words: list[str]) -> int:
    """Serve the model given as the first argument, as TGI's shard server does, but start the whole server."""
    prog = "text-generation-server serve"
    parser = options.Parser(prog=prog, usage=f"{prog} MODEL_ID [OPTIONS]", description="Serve a model over HTTP.")
    parser.add_argument("model", nargs="?", metavar="MODEL_ID", help="a Hub id, a folder, or a .gguf file")
    parser.add_argument("--uds-path", help="TGI: where the shard listened; no effect", metavar="PATH")
    parser.add_argument("--logger-level", help="TGI: --log-level", metavar="LEVEL")
    options.add_options(parser, Settings, flags=True)
    given = parser.parse_args(words)
    for name, value in (("model_id", given.model), ("log_level", given.logger_level)):
        if value is not None:
            setattr(given, name, value)
    if not hasattr(given, "otlp_service_name") and not Settings.environ().get("OTLP_SERVICE_NAME"):
        given.otlp_service_name = "text-generation-inference.server"  # the service name of TGI's shards
    return _serve(Settings.from_namespace(given))


def quantize(words: list[str]) -> int:
    """Write a quantized checkpoint of a model."""
    return int(_load("tokenmill.operate.quantize:main")(words))


def download_weights(words: list[str]) -> int:
    """Download a model and print its path."""
    about = "Get a model (a Hub id; without one: the embedded default) onto this machine and print its path."
    parser = options.Parser(prog="tokenmill download-weights", description=about)
    parser.add_argument("model_id", nargs="?", default="", metavar="MODEL_ID")
    parser.add_argument("--revision", help="branch, tag or commit")
    parser.add_argument("--huggingface-hub-cache", help="folder of the Hub's cache", metavar="FOLDER")
    parser.add_argument("--cache-dir", help="folder for the embedded default model", metavar="FOLDER")
    parser.add_argument("--extension", help="TGI: kind of weights; the best one there is, is taken", metavar="EXT")
    parser.add_argument("--auto-convert", action=argparse.BooleanOptionalAction, default=True,
                        help="convert pickled weights if there are no others")  # fmt: skip
    parser.add_argument("--merge-lora", action=argparse.BooleanOptionalAction, default=False,
                        help="TGI: merge an adapter into its base, which is done at every start anyway")  # fmt: skip
    parser.add_argument("--trust-remote-code", action=argparse.BooleanOptionalAction, default=False,
                        help="get a repository's Python files too")  # fmt: skip
    parser.add_argument("--logger-level", default="info", metavar="LEVEL")
    parser.add_argument("--json-output", action=argparse.BooleanOptionalAction, default=False,
                        help="progress as JSON log lines")  # fmt: skip
    given = parser.parse_args(words)
    wanted = ("revision", "huggingface_hub_cache", "cache_dir")
    named = {name: getattr(given, name) for name in wanted if getattr(given, name)}
    settings = Settings.from_env(model_id=given.model_id, json_output=given.json_output, **named)
    _load("tokenmill.logs:set_up")(given.logger_level, json=given.json_output)
    screen = _load("tokenmill.progress:display")(json=given.json_output)
    try:
        source = _load("tokenmill.fetch:fetch")(settings, screen.progress, convert=given.auto_convert)
    finally:
        screen.close()
    print(source.given)
    return 0


def warmup(words: list[str]) -> int:
    """Download a model and compile its kernels."""
    return int(_load("tokenmill.warmup:main")(words))


def env(words: list[str]) -> int:
    """Print the runtime environment."""
    options.Parser(prog="tokenmill env", description="What is installed and found here.").parse_args(words)
    print(_load("tokenmill.operate.env:report")())
    return 0


def doctor(words: list[str]) -> int:
    """Check everything that a start depends on."""
    return int(_load("tokenmill.operate.doctor:main")(words))


def schema(words: list[str]) -> int:
    """Print the OpenAPI document, or a page of the reference."""
    about = "The OpenAPI document of the server, as JSON; or a page of the reference, in Markdown."
    parser = options.Parser(prog="tokenmill schema", description=about)
    parser.add_argument("what", nargs="?", default="openapi", choices=("openapi", "http-api", "cli"),
                        help="the document (openapi), docs/reference/http-api.md, docs/reference/cli.md")  # fmt: skip
    what = parser.parse_args(words).what
    if what == "openapi":
        print(_load("tokenmill.server.routes.table:document_json")())
    elif what == "http-api":
        print(_load("tokenmill.operate.reference:http_api")(), end="")
    else:
        commands = {name: command.help for name, command in _commands().items()}
        print(_load("tokenmill.operate.reference:cli")(commands), end="")
    return 0
