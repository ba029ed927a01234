"""Check for packages that the base installation does not include, and explain how to install a missing one."""

from __future__ import annotations

import importlib.util

from tokenmill.errors import MissingPackage


def has_torch() -> bool:
    """Return True if torch is installed, without importing it."""
    return importlib.util.find_spec("torch") is not None


def need_torch(what: str) -> None:
    """Raise MissingPackage with the remedy unless torch is installed. `what`: subject of the message's sentence."""
    if not has_torch():
        raise MissingPackage(
            f"{what} needs torch, which is not installed. Install it with `pip install 'tokenmill[torch]'`, or in a "
            "checkout with `make torch`."
        )


def need_opentelemetry() -> None:
    """Raise MissingPackage with the remedy unless the tracing packages are installed, without importing them."""
    for name in ("opentelemetry", "opentelemetry.sdk", "opentelemetry.exporter", "opentelemetry.exporter.otlp",
                 "opentelemetry.exporter.otlp.proto", "opentelemetry.exporter.otlp.proto.grpc"):  # fmt: skip
        if importlib.util.find_spec(name) is None:
            raise MissingPackage(
                "`--otlp-endpoint` needs OpenTelemetry's packages, which are not installed. Install them with "
                "`pip install 'tokenmill[otel]'`, or leave the option out."
            )
