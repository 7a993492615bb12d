"""`nibble chat`: a conversation in the terminal, over HTTP or gRPC. Each answer is streamed."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from rich.console import Console

from cluster.commands.generate import server_errors
from cluster.errors import NibbleError
from deployments.client import NibbleClient

with suppress(ImportError):  # not built into every Python; with it, input() edits lines and has a history
    import readline  # noqa: F401

PROMPT = "> "
CLEAR = "/clear"
HELP = f"{CLEAR} begins a new conversation, Ctrl-C stops an answer, Ctrl-D ends."


def chat(url: str, model: str, system: str | None, options: dict[str, Any], console: Console) -> None:
    """Asks and answers until the end of the input. Raises ConfigError for a URL that is none.

    What the server refuses is told, and the conversation is again as it was before that message."""
    first = [] if system is None else [{"role": "system", "content": system}]
    messages = [*first]
    with NibbleClient(url) as client:
        console.print(f"{model} at {url}. {HELP}")
        while (line := next_line(console)) is not None:
            if line.strip() == CLEAR:
                messages = [*first]
            elif line.strip():
                asked = [*messages, {"role": "user", "content": line}]
                try:
                    text = answer(client, url, model, asked, options, console)
                    messages = [*asked, {"role": "assistant", "content": text}]
                except NibbleError as error:
                    console.print(f"nibble: {error}\nThe last message was left out; {CLEAR} begins anew.")


def next_line(console: Console) -> str | None:
    """None at the end of the input."""
    try:
        return input(PROMPT)  # not the console's: it lets readline know how long the prompt is
    except EOFError:
        console.print()
        return None


def answer(
    client: NibbleClient,
    url: str,
    model: str,
    messages: list[dict[str, str]],
    options: dict[str, Any],
    console: Console,
) -> str:
    """The answer, shown as it comes; after Ctrl-C, what had come. Raises NibbleError with the server's message."""
    text = ""
    try:
        with server_errors(url), client.stream_chat(model, messages, **options) as pieces:
            for piece in pieces:
                console.out(piece.text, end="", highlight=False)
                text += piece.text
    except KeyboardInterrupt:
        pass
    finally:
        console.print()
    return text
