"""Check for packages that the base installation does not include, and explain how to install a missing one."""

from __future__ import annotations

import importlib.util

from tokenmill.errors import MissingPackage

_INSTALL = "Install both with `pip install 'tokenmill[transformers]'`."
TRANSFORMERS_MAY = f"The library transformers may define it, but it or torch is not installed. {_INSTALL}"
"""Remedy for a model type that tokenmill does not have, where transformers is not installed."""


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


def has_transformers() -> bool:
    """Return True if torch and transformers are installed, without importing them."""
    return has_torch() and importlib.util.find_spec("transformers") is not None


def need_opentelemetry() -> None:
    """Raise MissingPackage with the remedy unless the tracing packages are installed, without importing them."""
    for name in ("opentelemetry", "opentelemetry.sdk", "opentelemetry.exporter", "opentelemetry.exporter.otlp",
                 "opentelemetry.exporter.otlp.proto", "opentelemetry.exporter.otlp.proto.grpc"):  # fmt: skip
        if importlib.util.find_spec(name) is None:
            raise MissingPackage(
                "`--otlp-endpoint` needs OpenTelemetry's packages, which are not installed. Install them with "
                "`pip install 'tokenmill[otel]'`, or leave the option out."
            )


def need_ray() -> None:
    """Raise MissingPackage with the remedy unless Ray Serve is installed, without importing it."""
    for name in ("ray", "aiohttp", "fastapi"):
        if importlib.util.find_spec(name) is None:
            raise MissingPackage(
                "`tokenmill deploy` needs Ray Serve, which is not installed. Install it with "
                "`pip install 'tokenmill[ray]'`."
            )
