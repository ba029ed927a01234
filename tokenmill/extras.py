"""Packages that the base installation leaves out, and what to say when one is needed."""

from __future__ import annotations

import importlib.util

from tokenmill.errors import MissingPackage


def has_torch() -> bool:
    """Whether torch is installed; looks, does not import."""
    return importlib.util.find_spec("torch") is not None


def need_torch(what: str) -> None:
    """Raise MissingPackage with the cure unless torch is installed. `what`: the sentence's subject."""
    if not has_torch():
        raise MissingPackage(
            f"{what} needs torch, which is not installed. Install it with `pip install 'tokenmill[torch]'`, or in a "
            "checkout with `make torch`."
        )


def need_opentelemetry() -> None:
    """Raise MissingPackage with the cure unless the packages that send traces are installed; looks, does not import."""
    for name in ("opentelemetry", "opentelemetry.sdk", "opentelemetry.exporter", "opentelemetry.exporter.otlp",
                 "opentelemetry.exporter.otlp.proto", "opentelemetry.exporter.otlp.proto.grpc"):  # fmt: skip
        if importlib.util.find_spec(name) is None:
            raise MissingPackage(
                "`--otlp-endpoint` needs OpenTelemetry's packages, which are not installed. Install them with "
                "`pip install 'tokenmill[otel]'`, or leave the option out."
            )
