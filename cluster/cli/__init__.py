"""The command line: arguments, defaults and exit codes. What a subcommand does is in `cluster/commands/`.

Imports of Ray and of the engines wait until a subcommand needs them: `nibble generate` starts in a moment.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from cluster.cli import artifacts, client, conversion, keys, serving
from cluster.errors import NibbleError

DISTRIBUTION = "nibble-serve"

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for part in (conversion, serving, client):
    app.add_typer(part.app)
app.add_typer(artifacts.app, name="artifacts")
app.add_typer(keys.app, name="keys")


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"nibble {version(DISTRIBUTION)}")
        raise typer.Exit


@app.callback()
def options(
    show: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    """INT4 inference of Hugging Face language models on clusters of plain CPUs."""


def main() -> None:
    """Exit code 0, 1 for an error of nibble's own (one line on stderr), 2 for wrong arguments, 130 for Ctrl-C."""
    try:
        app()
    except NibbleError as error:
        print(f"nibble: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
