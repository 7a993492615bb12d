"""`nibble artifacts`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.options import Address, plain_console
from cluster.config import ArtifactsConfig, load_config

app = typer.Typer(help="What is kept in node caches and the durable copy.", no_args_is_help=True)

ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML whose artifacts: to use. Default: none.")]


def artifacts_config(path: Path | None) -> ArtifactsConfig:
    return load_config(path).artifacts if path else ArtifactsConfig()


@app.command("list")
def list_(config: ConfigFile = None, address: Address = None) -> None:
    """Every artifact and where it is kept."""
    from cluster.commands.artifacts import list_artifacts

    list_artifacts(artifacts_config(config), address, plain_console())


@app.command()
def verify(config: ConfigFile = None, address: Address = None) -> None:
    """Read every copy whole and compare it with its manifest; exit code 1 where one is damaged."""
    from cluster.commands.artifacts import verify_artifacts

    verify_artifacts(artifacts_config(config), address, plain_console())


@app.command()
def remove(
    artifact_id: Annotated[str, typer.Argument(help="As `nibble artifacts list` shows it.")],
    config: ConfigFile = None,
    address: Address = None,
) -> None:
    """Remove an artifact from node caches and the durable copy; not while a replica uses it."""
    from cluster.commands.artifacts import remove_artifact

    remove_artifact(artifact_id, artifacts_config(config), address, plain_console())
