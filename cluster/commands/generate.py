"""`nibble generate` and `nibble models`: what the Python client does, from the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.errors import NibbleError, RequestError
from deployments.client import NibbleClient
from deployments.error_statuses import status_of


def generate(
    url: str,
    model: str,
    prompt: str,
    stream: bool,
    options: dict[str, Any],
    messages: list[dict[str, str]] | None = None,
) -> Iterator[str]:
    """The completion's text, in pieces where `stream`; with `messages`, the next one of that conversation.

    Raises NibbleError with the server's own message and its status.
    """
    with server_errors(url), NibbleClient(url) as client:
        if stream:
            pieces = (
                client.stream_chat(model, messages, **options) if messages else client.stream(model, prompt, **options)
            )
            with pieces:
                yield from (piece.text for piece in pieces)
        else:
            whole = client.chat(model, messages, **options) if messages else client.complete(model, prompt, **options)
            yield whole.text


@contextmanager
def server_errors(url: str) -> Iterator[None]:
    """A refusal becomes a NibbleError with the server's own message and its status."""
    try:
        yield
    except RequestError as error:
        status = status_of(error)
        code = f"gRPC {status.grpc.name}" if url.startswith("grpc") else f"HTTP {status.http}"
        raise NibbleError(f"{code}: {error}") from None


def conversation(prompt: str, system: str | None) -> list[dict[str, str]]:
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": prompt}]


def models(url: str, console: Console) -> None:
    """Of the cluster behind `url`. Raises NibbleError where none answers."""
    table = Table("model", "family", "engine", "quantization", "context", "ready")
    with NibbleClient(url) as client:
        for card in client.models():
            ready = "yes" if card.ready else "no"
            table.add_row(card.id, card.family, card.engine, card.quantization, str(card.context), ready)
    console.print(table)
