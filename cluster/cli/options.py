"""Options that several subcommands have, and where their answers are printed."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

Address = Annotated[str | None, typer.Option(help="A running Ray cluster to use, HOST:PORT or auto.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the checkpoint and say what it needs; change nothing.")]


def plain_console() -> Console:
    """Prints text as it is: a model's answer may hold [brackets], and builtin:llama is no emoji."""
    return Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
