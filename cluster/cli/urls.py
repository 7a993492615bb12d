"""The servers that subcommands ask, as people write them: with or without scheme and /v1."""

from __future__ import annotations

from cluster.errors import ConfigError

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_GRPC = "127.0.0.1:9000"
URL_HELP = f"With or without scheme and /v1. Default {DEFAULT_URL}, with --grpc {DEFAULT_GRPC}."


def default_url(grpc: bool) -> str:
    return DEFAULT_GRPC if grpc else DEFAULT_URL


def with_scheme(url: str, grpc: bool) -> str:
    return url if "://" in url else f"{'grpc' if grpc else 'http'}://{url}"


def client_url(url: str | None, grpc: bool) -> str:
    """What NibbleClient takes. Raises ConfigError for another protocol than --grpc asks for."""
    target = with_scheme(url or default_url(grpc), grpc)
    if grpc and target.startswith(("http://", "https://")):
        raise ConfigError(
            f"url: found {url}, with --grpc allowed are HOST:PORT, grpc://HOST:PORT and grpcs://HOST:PORT"
        )
    return target
