"""`nibble keys`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.options import plain_console

app = typer.Typer(help="The API keys of the file that auth.api_keys_file names.", no_args_is_help=True)

KeysFile = Annotated[Path, typer.Argument(help="The keys' file.")]
KeyName = Annotated[str, typer.Argument(help="Whose key it is.")]


@app.command()
def add(
    file: KeysFile,
    name: KeyName,
    max_concurrent: Annotated[int | None, typer.Option(min=1, help="Requests at once. Default: no limit.")] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Of prompts and completions. Default: no limit.")
    ] = None,
) -> None:
    """Make a key and print it, this once; the file, made where there is none, keeps its hash."""
    from cluster.commands.keys import add_key

    print(add_key(file, name, max_concurrent, tokens_per_minute))
    print(f"This is {name}'s key; it is kept nowhere and cannot be shown again.", file=sys.stderr)


@app.command("list")
def list_keys(file: KeysFile) -> None:
    """The keys' names and limits."""
    from cluster.commands.keys import list_keys

    list_keys(file, plain_console())


@app.command("remove")
def remove_key(file: KeysFile, name: KeyName) -> None:
    """Remove a key: a running router refuses it a second later."""
    from cluster.commands.keys import remove_key

    remove_key(file, name)
